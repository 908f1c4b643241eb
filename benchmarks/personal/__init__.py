"""Does routing pay where the text does not tell the task? Users with tastes, and tenants with queues, of their own."""

import logging
import os

if "PEFT_POLY_QUIET" in os.environ:  # set for the workers
    logging.disable(logging.WARNING)  # what PEFT imports would say what it lacks, into the progress bar
