#!/usr/bin/env bash
# Several machines. Run the same command on each of them, within a few minutes:
#
#   HEAD=10.0.0.1 NODES=4 scripts/nodes.sh parallel=hsdp model=gpt2_xl ...
#   HEAD=10.0.0.1 NODES=2:4 ID=run7 scripts/nodes.sh parallel=ddp ...      2 to 4 machines: the job
#       goes on with fewer when one is lost, and takes it in again when it returns
#
#   HEAD    address of one of the machines, which the others can reach; it hosts the rendezvous, and
#           the job ends with it
#   PORT    a free port there (29500)
#   ID      name of the job, the same everywhere (gpt2)
#   NODES   how many machines, or the fewest and the most
#   ADDRESS of this machine, as the others reach it, where its host name does not say (unset)
#   PROCESSES of each machine (its GPUs)
#   PYTHON  the interpreter (python3)
#
# The run directory (paths.runs, or run.dir) and the data (data.dir) must lie on storage that all
# machines share. Machines talk over the interface that leads to HEAD; set NCCL_SOCKET_IFNAME and
# GLOO_SOCKET_IFNAME if that is not the fast one.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${HEAD:?address of the machine that hosts the rendezvous}" "${NODES:?number of machines}"

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
processes=${PROCESSES:-$(( gpus > 0 ? gpus : 2 ))}
python=${PYTHON:-python3}

# Only HEAD hosts the store: with torch's default any machine may, and the job dies with that one.
host=0
for address in ${ADDRESS:-$(hostname -I 2>/dev/null) $(hostname) $(hostname -s) localhost 127.0.0.1}; do
  if [[ "$address" == "$HEAD" ]]; then host=1; fi
done

# A restarted job must not read the addresses of the dead one from the shared store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Seconds for the step under way and a checkpoint, once the run is asked to stop.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

# A mistake in the settings is found here, once: torchrun would start it again and again. So is a
# batch that does not divide among the processes of a number of machines that the range has.
"$python" -m scripts.validate "$NODES" "$processes" "$@"

# With a range of machines: start 30 s after the fewest are there, notice a lost one within seconds.
exec "$python" -m torch.distributed.run --nnodes="$NODES" --nproc_per_node="$processes" --max-restarts=10 \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29500}" --rdzv-id="${ID:-gpt2}" \
  ${ADDRESS:+--local-addr="$ADDRESS"} \
  --rdzv-conf="is_host=$host,last_call_timeout=30,keep_alive_interval=2,keep_alive_max_attempt=5" \
  train.py "$@"
