# shellcheck shell=bash
# One TPU, for tpu_vm.sh: its names in each API, its state, and how its workers are reached.
#
# Two APIs: `tpu` is the Cloud TPU API (nodes and queued resources, up to v6e; Google only maintains it now), `compute` is
# Compute Engine (instances and managed instance groups; the way forward, and the only one from tpu7x on).
# shellcheck disable=SC2034,SC2153,SC2154  # variables go between the files

state=""    # of the machine: none waiting ready stopped gone
workers=()  # names of its VMs, with API=compute
hosts=1     # how many there should be, with API=compute
culprits="" # workers at which the last command failed

machine_settings() {
  generation="${TYPE:-}" shape="" chips=""
  [[ -z "${TOPOLOGY:-}" ]] || read_topology
  [[ -n "$generation" ]] || die "neither TOPOLOGY nor TYPE is set: give one, such as TOPOLOGY=v5e:4x4"
  case "$generation" in
    tpu7x*) API="${API:-compute}" ;;
    *) API="${API:-tpu}" ;;
  esac
  case "$API:$generation" in
    tpu:tpu7x*) die "the Cloud TPU API has no tpu7x: leave API unset, or use launch/gke.sh" ;;
    tpu:*) tpu_settings ;;
    compute:v5p | compute:v6e | compute:tpu7x) compute_settings ;;
    compute:*) die "API=compute needs a TOPOLOGY of v5p, v6e or tpu7x, not $generation" ;;
    *) die "API=$API: tpu or compute" ;;
  esac
  place=("--project=$PROJECT" "--zone=$ZONE")
  IFS=' ' read -r -a create_flags <<<"${CREATE_FLAGS:-}"
  IFS=' ' read -r -a ssh_flags <<<"${SSH_FLAGS:-}"
}

# The Cloud TPU API's names: v5e is v5litepod, and v5p counts cores, two to a chip.
tpu_settings() {
  case "${TYPE:-$generation}" in
    v5e) accelerator=("--accelerator-type=v5litepod-$chips") ;;
    v6e) accelerator=("--accelerator-type=v6e-$chips") ;;
    v5p) accelerator=("--accelerator-type=v5p-$((2 * chips))") ;;
    v4) accelerator=(--type=v4 "--topology=$shape") ;;
    *) accelerator=("--accelerator-type=$TYPE") ;;
  esac
  case "$generation" in # https://docs.cloud.google.com/tpu/docs/runtimes
    v6e*) VERSION="${VERSION:-v2-alpha-tpuv6e}" ;;
    v5p*) VERSION="${VERSION:-v2-alpha-tpuv5}" ;;
    v5e | v5lite*) VERSION="${VERSION:-v2-alpha-tpuv5-lite}" ;;
    *) VERSION="${VERSION:-tpu-ubuntu2204-base}" ;;
  esac
}

# One VM is an instance; more are a managed instance group, which a workload policy connects into a slice.
compute_settings() {
  case "$generation" in
    tpu7x) MACHINE="${MACHINE:-tpu7x-standard-4t}" VERSION="${VERSION:-ubuntu-accel-2404-amd64-tpu-tpu7x}" ;;
    v6e) MACHINE="${MACHINE:-ct6e-standard-4t}" ;;
    v5p) MACHINE="${MACHINE:-ct5p-hightpu-4t}" ;; # unconfirmed: some lists have ct5p-hightpu-4t-tpu
  esac
  VERSION="${VERSION:-ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e}"
  chips_to_hosts "$MACHINE"
  region="${ZONE%-*}"
}

# Sets `state`. Status 1 where it is not known: `why` says why.
find_state() {
  local found=0 was="$state"
  culprits=""
  case "$API:${QUEUED:-1}" in
    tpu:0) node_state || found=$? ;;
    tpu:*)
      assumed=ACTIVE query gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" \
        '--format=value(state.state)' || found=$?
      if [[ "$answer" == ACTIVE ]]; then # the request was met: is the machine still up?
        node_state || found=$?
        ((found != 1)) || found=0 answer=PREEMPTED
      fi
      ;;
    *) members || found=$? ;;
  esac
  case "$found:$answer" in
    1:*) state=none ;;
    2:*) return 1 ;;
    *:READY | *:RUNNING) state=ready ;;
    *:SUSPEND* | *:FAILED | *:PREEMPTED | *:TERMINATED) state=gone ;;
    *:STOPPED) state=stopped ;;
    *) state=waiting ;;
  esac
  [[ "$state" == "$was" || -n "$dry_run" ]] || say "$NAME: $state${answer:+ ($answer)}"
}

node_state() { assumed=READY query gcloud compute tpus tpu-vm describe "$NAME" "${place[@]}" '--format=value(state)'; }

# Of Compute Engine: sets `workers` to the names of the VMs, and `answer` to one status for all of them.
members() {
  local name status all="" running=0 found=0
  if ((hosts > 1)); then
    assumed="$NAME-VM RUNNING" query gcloud compute instance-groups managed list-instances "$NAME" "${place[@]}" \
      '--format=value[separator=" "](instance.basename(),instanceStatus)' || found=$?
  else
    assumed="$NAME RUNNING" query gcloud compute instances describe "$NAME" "${place[@]}" \
      '--format=value[separator=" "](name,status)' || found=$?
  fi
  workers=()
  while read -r name status; do
    [[ -n "$name" ]] || continue
    workers+=("$name")
    all="$all $status"
    [[ "$status" != RUNNING ]] || running=$((running + 1))
  done <<<"$answer"
  case "$all" in
    *TERMINATED* | *STOP* | *SUSPEND*) answer=TERMINATED ;; # a slice without one member is gone
    *) answer="$running of $hosts running" ;;
  esac
  if ((running == hosts)) || [[ -n "$dry_run" ]]; then answer=RUNNING; fi
  return "$found"
}

# Asks for the machine. Status 1 where that was refused: `why` says why.
request() {
  local flags=()
  [[ "${SPOT:-0}" == 0 ]] || flags=(--spot)
  flags+=(${create_flags[@]+"${create_flags[@]}"})
  case "$API:${QUEUED:-1}" in
    tpu:0)
      run gcloud compute tpus tpu-vm create "$NAME" "${place[@]}" "${accelerator[@]}" "--version=$VERSION" \
        ${flags[@]+"${flags[@]}"}
      ;;
    tpu:*)
      run gcloud compute tpus queued-resources create "$NAME" "--node-id=$NAME" "${place[@]}" "${accelerator[@]}" \
        "--runtime-version=$VERSION" ${flags[@]+"${flags[@]}"}
      ;;
    *) request_compute ;;
  esac
}

# https://docs.cloud.google.com/compute/docs/tpus/create-tpu-mig-multi-host-slice and .../tpu/docs/spot-compute
request_compute() {
  local machine=("--machine-type=$MACHINE" "--image-family=$VERSION" --image-project=ubuntu-os-accelerator-images
    --maintenance-policy=TERMINATE --boot-disk-size=200GB --scopes=cloud-platform)
  [[ "${SPOT:-0}" == 0 ]] || machine+=(--provisioning-model=SPOT --instance-termination-action=STOP)
  machine+=(${create_flags[@]+"${create_flags[@]}"})
  if ((hosts == 1)); then
    run gcloud compute instances create "$NAME" "${place[@]}" "${machine[@]}"
    return
  fi
  unless "already exists" gcloud compute resource-policies create workload-policy "$NAME" "--project=$PROJECT" \
    "--region=$region" --type=HIGH_THROUGHPUT "--accelerator-topology=$shape" || return 1
  unless "already exists" gcloud compute instance-templates create "$NAME" "--project=$PROJECT" "${machine[@]}" || return 1
  run gcloud compute instance-groups managed create "$NAME" "${place[@]}" "--size=$hosts" "--template=$NAME" \
    --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing \
    "--workload-policy=projects/$PROJECT/regions/$region/resourcePolicies/$NAME"
}

# Deletes everything; what is gone already is no failure.
remove() {
  case "$API:${QUEUED:-1}" in
    tpu:0) remove_one tpus tpu-vm delete "$NAME" "${place[@]}" ;;
    tpu:*) remove_one tpus queued-resources delete "$NAME" "${place[@]}" --force ;;
    *)
      if ((hosts == 1)); then
        remove_one instances delete "$NAME" "${place[@]}"
      else
        remove_one instance-groups managed delete "$NAME" "${place[@]}"
        remove_one instance-templates delete "$NAME" "--project=$PROJECT"
        remove_one resource-policies delete "$NAME" "--project=$PROJECT" "--region=$region"
      fi
      ;;
  esac
}

remove_one() {
  unless "not.?found|does not exist" gcloud compute "$@" --quiet || die "$(why); it may still cost money: look at the console"
}

# on_workers WHICH COMMAND: a shell command on worker WHICH (a number, or all); what they say is in $output.
# Status 1, and `culprits`, where it fails on some.
on_workers() {
  if [[ "$API" == tpu ]]; then
    spread "" gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" "--worker=$1" ${ssh_flags[@]+"${ssh_flags[@]}"} "--command=$2"
  else
    spread "$1" gcloud compute ssh @ "${place[@]}" ${ssh_flags[@]+"${ssh_flags[@]}"} "--command=$2"
  fi
}

# to_workers FILE NAME: a copy of a file in the home directory of every worker.
to_workers() {
  if [[ "$API" == tpu ]]; then
    spread "" gcloud compute tpus tpu-vm scp "$1" "$NAME:$2" "${place[@]}" --worker=all ${ssh_flags[@]+"${ssh_flags[@]}"}
  else
    spread all gcloud compute scp "$1" "@:$2" "${place[@]}" ${ssh_flags[@]+"${ssh_flags[@]}"}
  fi
}

# spread WHICH COMMAND...: once for each worker, its name in place of every @, eight at a time. "": gcloud does it.
spread() {
  local which="$1" name i=0 chosen=(${workers[@]+"${workers[@]}"})
  shift
  culprits=""
  if [[ -z "$which" ]]; then
    quietly "$output" "$@" && return
    culprits="$(failed_workers)"
    return 1
  fi
  [[ "$which" == all ]] || chosen=("${workers[$which]-}")
  [[ -n "${chosen[0]-}" ]] || die "there is no worker $which of $NAME"
  rm -f "$scratch"/worker.*
  for name in "${chosen[@]}"; do
    (quietly "$scratch/worker.$i" "${@//@/$name}" || echo "$name" >"$scratch/failed.$i") &
    i=$((i + 1))
    ((i % 8)) || wait
  done
  wait
  [[ -n "$dry_run" ]] || cat "$scratch"/worker.* >"$output"
  culprits="$(find "$scratch" -name 'failed.*' -exec cat {} + | tr '\n' ' ' | sed 's/ $//')"
  rm -f "$scratch"/failed.*
  [[ -z "$culprits" ]]
}

# gcloud names a worker where the command failed, and repeatedly one that it cannot reach.
failed_workers() {
  {
    sed -n 's/.*ommand execution on worker \([0-9]*\) failed.*/\1/p' "$output"
    sed -n 's/.*ttempting to connect to worker \([0-9]*\).*/\1/p' "$output" | sort | uniq -d
  } | sort -nu | tr '\n' ' ' | sed 's/ $//'
}

# blame WHAT: the line for WHAT that failed on some workers.
blame() { echo "${culprits:+worker $culprits of }$NAME: $1 failed: $(why)"; }
