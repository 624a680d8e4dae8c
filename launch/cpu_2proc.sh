#!/usr/bin/env bash
# Runs a recipe in two processes on the CPU:
#
#     launch/cpu_2proc.sh RECIPE.yaml... [key.sub=value...]
#     launch/cpu_2proc.sh resume RUN
#
# It is torchrun and not `accelerate launch --cpu --num_processes 2`, which silently starts one process.
# The processes exchange tensors over the loopback interface; the store of torchrun itself, where they find each other,
# listens on a port of every interface while they run (it has no setting for that).
# After Ctrl-C or SIGTERM the second form continues the run; torchrun ends with a traceback of its own, and RUN/interrupted tells.
set -euo pipefail
if (($# == 0)); then
  echo "usage: $0 RECIPE.yaml... [key.sub=value...], or $0 resume RUN" >&2
  exit 2
fi

export CUDA_VISIBLE_DEVICES='' ACCELERATE_USE_CPU=true # also where there is a GPU
export ATP_RL_PROMISED=2                              # each process looks whether there are so many
export OMP_NUM_THREADS=1                             # a process a core
export GLOO_SOCKET_IFNAME=lo                         # tensors go over the loopback interface
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}" # seconds to finish a step after a signal
[[ "$1" == resume ]] || set -- run "$@"
exec torchrun --standalone --local_addr 127.0.0.1 --nproc_per_node 2 -m atp_rl "$@"
