#!/usr/bin/env bash
# All GPUs of this machine, weights, gradients and optimizer state sharded (FSDP2); without a GPU
# two processes on the CPU, the same way.
#
#   scripts/fsdp.sh                                                the default run
#   scripts/fsdp.sh model=gpt2_xl data=openwebtext optim=mars_adamw train.global_batch=480 \
#       train.micro_batch=4 parallel.activation_checkpointing=true   any settings of train.py
#   PROCESSES=4 scripts/fsdp.sh ...                                4 processes
#
# The same command continues an interrupted run, also with another number of processes.
set -euo pipefail
cd "$(dirname "$0")/.."

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
processes=${PROCESSES:-$(( gpus > 0 ? gpus : 2 ))}
python=${PYTHON:-python3}

# torchrun restarts all processes after a crash, up to 3 times; they continue from the last
# checkpoint. The variable makes the restarted ones forget the addresses of the dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# One CPU thread per process on a GPU machine; on a CPU they would share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Seconds for the step under way and a checkpoint, once the run is asked to stop.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

# A mistake in the settings is found here, once: torchrun would start it again and again.
"$python" -m scripts.validate 1 "$processes" parallel=fsdp "$@"

exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$processes" --max-restarts=3 \
  train.py parallel=fsdp "$@"
