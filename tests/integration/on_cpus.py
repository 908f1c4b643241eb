"""Has accelerate shard on CPUs, which it does on accelerators only: `on_cpus.py SCRIPT ARGS` runs a script so."""

import os
import runpy
import sys

import accelerate.state

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
multi_gpu = ("gloo", accelerate.state.DistributedType.MULTI_GPU)
accelerate.state.PartialState._prepare_backend = lambda self, cpu=False, sagemaker_dp=False, backend=None: multi_gpu

if __name__ == "__main__":
    sys.argv.pop(0)
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
