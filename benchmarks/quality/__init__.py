"""Does routing pay? Accuracy of task-routed adapters beside LoRAs of the same size, on real tasks."""

import logging
import os

if "PEFT_POLY_QUIET" in os.environ:  # set for the workers
    logging.disable(logging.WARNING)  # what PEFT imports would say what it lacks, into the progress bar
