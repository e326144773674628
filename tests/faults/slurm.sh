#!/usr/bin/env bash
# Tests launch/slurm.sbatch on a SLURM cluster of this machine alone, set up in a temporary folder,
# and prints the counts. Needs root, slurm-wlm and munge: PYTHON=python tests/faults/slurm.sh
# Jobs of two tasks run to their end, get SIGTERM, are killed, or are requeued by the scheduler. All
# must reach the same final loss.
set -euo pipefail
cd "$(dirname "$0")/../.."

folder=$(mktemp -d)
export SLURM_CONF=$folder/slurm.conf PYTHON=${PYTHON:-python} PYTHONPATH=$PWD JAX_PLATFORMS=cpu
trap 'set +e; scancel --quiet --me; sleep 2; kill $(cat "$folder"/*.pid); sleep 2; rm -rf "$folder"' EXIT
cat >"$SLURM_CONF" <<END
ClusterName=faults
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=8
PartitionName=all Nodes=ALL Default=YES
END
mkdir "$folder/state" "$folder/spool"
head -c 1024 /dev/urandom >"$folder/munge.key"
chmod 600 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
slurmctld && slurmd

flags=(--config=configs/quickstart.py --config.epochs=4 --config.model.width_multiplier=0.125
  '--config.model.stages=(1,)' --config.log.tensorboard=False --config.log.report=False
  --config.log.every_steps=1 --config.checkpoint.every_epochs=1 --config.eval.every_epochs=1000
  --config.eval.baselines=False --timeout=20)

submit() { # NAME [flags]: prints the job's id; the log is NAME.log, the workdir NAME
  local name=$1
  shift
  sbatch --parsable --nodes=1 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 \
    --output="$folder/$name.log" launch/slurm.sbatch "${flags[@]}" --workdir="$folder/$name" "$@"
}
field() { scontrol --oneliner show job "$1" | grep -oP "\b$2=\K\S+"; }
ends() { # JOB STATE RESTARTS CODE
  until [[ $(field "$1" JobState) =~ COMPLETED|FAILED|CANCELLED|TIMEOUT ]]; do sleep 1; done
  local outcome
  outcome="$(field "$1" JobState) $(field "$1" Restarts) $(field "$1" ExitCode)"
  [[ $outcome == "$2 $3 $4:0" ]] || fail "job $1 ended with $outcome; expected $2 $3 $4:0"
}
fail() {
  echo "error: $1" >&2
  tail -n 5 "$folder"/*.log >&2
  exit 1
}
losses() { grep -oP '"train/loss": \K[^,]*' "$folder/$1/metrics.jsonl"; }

XLA_FLAGS=--xla_force_host_platform_device_count=2 "$PYTHON" -m simsiam_jax.main "${flags[@]}" \
  --config.epochs=1 --workdir="$folder/single" >"$folder/single.log" 2>&1 || fail 'one process'
ends "$(submit whole)" COMPLETED 0 0
[[ $(losses whole | head -n 1) == "$(losses single | head -n 1)" ]] || fail 'the first losses differ'
[[ $(grep -c ' on 2 x cpu' "$folder/whole.log") == 1 ]] || fail 'expected output of process 0 only'
for what in term kill requeue; do
  job=$(submit $what)
  until [[ $(losses $what 2>/dev/null | wc -l) -ge 14 ]]; do sleep 0.1; done
  case $what in
    term) scancel --signal=TERM "$job" ;;
    kill) pkill -9 -o -f "^$PYTHON .*--workdir=$folder/kill" ;; # one of two
    requeue) scontrol requeue "$job" ;;
  esac
  ends "$job" COMPLETED 1 0
  grep -q 'resuming from step' "$folder/$what.log" || fail "$what: did not resume"
  [[ $(losses $what | tail -n 1) == "$(losses whole | tail -n 1)" ]] || fail "$what: different final loss"
  echo "$what: requeued, $(grep -o 'resuming from step [0-9]*' "$folder/$what.log"), same final loss"
done
ends "$(submit user_error --config.task=nonsense)" FAILED 0 1
printf '#!/bin/sh\nexit 75\n' >"$folder/dies"
chmod +x "$folder/dies"
ends "$(PYTHON=$folder/dies MAX_RESTARTS=2 submit dies)" FAILED 2 75
echo "$(slurmctld -V): passed with 1 whole run, 3 stopped, 1 user error, 1 that always dies"
