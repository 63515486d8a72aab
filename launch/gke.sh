#!/usr/bin/env bash
# A training run on a TPU slice of Google Kubernetes Engine: one JobSet (gke/jobset.yaml) in one image (Dockerfile).
#
#   launch/gke.sh [--dry-run] VERB
#
#   create ARGS...    builds and pushes the image, makes the node pool if there is none, and starts `dino-jax train ARGS...`;
#                     JobSet starts it again after a preemption or a crash, from the last checkpoint
#   logs [--follow]   what worker 0 (or WORKER=N) wrote
#   status            of the run and its pods
#   delete            ends the run and deletes the node pool; the workdir in its bucket stays
#
# Set in the environment:
#   PROJECT           as gcloud knows it
#   CLUSTER, LOCATION an existing GKE cluster: its name, its region or zone
#   ZONE              of the TPUs: the node pool's (LOCATION, if that is a zone)
#   NAME              of the run and its node pool (dino)
#   TOPOLOGY          as for `dino-jax plan`: v5e:4x4, v6e:4x4, v5p:2x2x4, tpu7x:2x2x2
#   WORKDIR           gs://bucket/folder of the run
#   REPOSITORY        where the image goes: HOST/PROJECT/FOLDER, as Artifact Registry shows it; or IMAGE, its whole name
#   BUILD=0           IMAGE exists already
#   SPOT=1            cheaper; Google may take the machines away at any time
#   POOL=0            make no node pool: the cluster has one, or is an Autopilot cluster
#   POOL_FLAGS        more flags for the command that makes it, such as "--reservation-affinity=specific --reservation=NAME"
#   MACHINE           the node pool's machine type
#   NAMESPACE, SERVICE_ACCOUNT    Kubernetes' (default, default); the account needs the right to write to the bucket
#   MAX_RESTARTS      restarts before JobSet gives up (30)
#
# --dry-run shows every command and the manifest, and runs none. docs/launch.md has more.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/cloud.sh
source "$root/launch/cloud.sh"

NAME="${NAME:-dino}"
NAMESPACE="${NAMESPACE:-default}"
jobset_release="https://github.com/kubernetes-sigs/jobset/releases/download/v0.12.0/manifests.yaml"

main() {
  [[ "${1:-}" != --dry-run ]] || { dry_run=yes && shift; }
  check_verb "${1:-}" create logs status delete
  local verb="$1"
  shift
  PROJECT="${PROJECT:-${CLOUDSDK_CORE_PROJECT:-}}"
  require PROJECT "the Google Cloud project that pays (gcloud projects list)"
  require CLUSTER "an existing GKE cluster (gcloud container clusters list --project=$PROJECT)"
  require LOCATION "the cluster's region or zone, such as us-west4"
  [[ "$NAME" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || die "NAME=$NAME: lower-case letters, digits and -, 40 at most"
  place=("--project=$PROJECT" "--location=$LOCATION")
  need gcloud "https://cloud.google.com/sdk/docs/install"
  need kubectl "gcloud components install kubectl gke-gcloud-auth-plugin"
  must gcloud container clusters get-credentials "$CLUSTER" "${place[@]}"
  "$verb" "$@"
}

create() {
  local argument given=""
  for argument in "$@"; do
    case "$argument" in --workdir=*) given="${argument#*=}" ;; --workdir) die "write --workdir=gs://..., in one word" ;; esac
  done
  WORKDIR="${given:-${WORKDIR:-}}"
  require WORKDIR "gs://bucket/folder: a pod's disk is not kept"
  [[ "$WORKDIR" == gs://* ]] || die "WORKDIR=$WORKDIR: a gs:// path is needed; a pod's disk is not kept"
  [[ -n "$given" ]] || set -- "$@" "--workdir=$WORKDIR"
  require TOPOLOGY "the slice, such as TOPOLOGY=v5e:4x4"
  read_topology
  slice
  has_jobset
  image
  pool
  fill train "$@"
  if [[ -n "$dry_run" ]]; then
    show kubectl apply -f -
    printf '%s\n' "$manifest"
    return
  fi
  say "kubectl apply -f - (launch/gke/jobset.yaml, filled in)"
  printf '%s\n' "$manifest" | kubectl apply -f - >"$output" 2>&1 || die "$(why)"
  say "$NAME is started: launch/gke.sh status, launch/gke.sh logs --follow; it costs money until launch/gke.sh delete"
}

# The names of https://docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus for the topology.
slice() {
  case "$generation" in
    v4) accelerator=tpu-v4-podslice MACHINE="${MACHINE:-ct4p-hightpu-4t}" ;;
    v5e) accelerator=tpu-v5-lite-podslice MACHINE="${MACHINE:-ct5lp-hightpu-4t}" ;;
    v5p) accelerator=tpu-v5p-slice MACHINE="${MACHINE:-ct5p-hightpu-4t}" ;;
    v6e) accelerator=tpu-v6e-slice MACHINE="${MACHINE:-ct6e-standard-4t}" ;;
    tpu7x) accelerator=tpu7x MACHINE="${MACHINE:-tpu7x-standard-4t}" ;;
  esac
  chips_to_hosts "$MACHINE"
}

has_jobset() {
  query kubectl get crd jobsets.jobset.x-k8s.io -o name || {
    (($? == 1)) || die "$(why)"
    die "cluster $CLUSTER has no JobSet: kubectl apply --server-side -f $jobset_release"
  }
}

image() {
  local tag
  if [[ -z "${IMAGE:-}" ]]; then
    require REPOSITORY "where the image goes: HOST/$PROJECT/FOLDER, as Artifact Registry shows it; or give IMAGE"
    tag="$(git -C "$root" describe --always --dirty 2>/dev/null)" || tag="$(date +%Y%m%d-%H%M%S)"
    IMAGE="$REPOSITORY/dino-jax:$tag"
  fi
  [[ "${BUILD:-1}" != 0 ]] || return 0
  need docker "https://docs.docker.com/engine/install, or give IMAGE and BUILD=0"
  packing -
  if [[ -n "$dry_run" ]]; then
    show "${packing[@]}"
    show docker build --platform linux/amd64 -f launch/Dockerfile -t "$IMAGE" -
    show docker push "$IMAGE"
    return
  fi
  say "docker build -t $IMAGE"
  "${packing[@]}" | docker build --platform linux/amd64 -f launch/Dockerfile -t "$IMAGE" - >"$output" 2>&1 ||
    die "the image could not be built: $(why)"
  run docker push "$IMAGE" ||
    die "the image could not be pushed: $(why) (run gcloud auth configure-docker ${IMAGE%%/*}; the repository must exist)"
}

# Makes the node pool, unless POOL=0 or it exists. A slice of several tpu7x hosts needs a workload policy, where older
# generations take --tpu-topology.
pool() {
  local flags=("--machine-type=$MACHINE" "--num-nodes=$hosts" --scopes=cloud-platform) region more=()
  [[ "${POOL:-1}" != 0 ]] || return 0
  ZONE="${ZONE:-$LOCATION}"
  [[ "$ZONE" =~ [a-z]$ ]] || die "ZONE is not set, and LOCATION=$LOCATION is a region: give the zone of the TPUs, such as ${LOCATION}-a"
  region="${ZONE%-*}"
  query gcloud container node-pools describe "$NAME" "${place[@]}" "--cluster=$CLUSTER" '--format=value(status)' && [[ -z "$dry_run" ]] && return
  IFS=' ' read -r -a more <<<"${POOL_FLAGS:-}"
  flags+=("--node-locations=$ZONE")
  [[ "${SPOT:-0}" == 0 ]] || flags+=(--spot)
  if [[ "$generation" != tpu7x ]]; then
    ((hosts == 1)) || flags+=("--tpu-topology=$shape")
  elif ((hosts > 1)); then
    unless "already exists" gcloud compute resource-policies create workload-policy "$NAME" "--project=$PROJECT" \
      "--region=$region" --type=HIGH_THROUGHPUT "--accelerator-topology=$shape" || die "$(why)"
    flags+=("--placement-policy=$NAME")
  fi
  must gcloud container node-pools create "$NAME" "${place[@]}" "--cluster=$CLUSTER" "${flags[@]}" ${more[@]+"${more[@]}"}
}

# fill ARGS...: sets `manifest` to gke/jobset.yaml with its variables filled in.
fill() {
  local argument json="" selector="# not only spot nodes"
  for argument in "$@"; do
    argument="${argument//\\/\\\\}"
    json="$json${json:+, }\"${argument//\"/\\\"}\""
  done
  [[ "${SPOT:-0}" == 0 ]] || selector='cloud.google.com/gke-spot: "true"'
  manifest="$(<"$root/launch/gke/jobset.yaml")"
  put NAME "$NAME"
  put NAMESPACE "$NAMESPACE"
  put SERVICE_ACCOUNT "${SERVICE_ACCOUNT:-default}"
  put MAX_RESTARTS "${MAX_RESTARTS:-30}"
  put HOSTS "$hosts"
  put PER_HOST "$per_host"
  put ACCELERATOR "$accelerator"
  put SHAPE "$shape"
  put SPOT_SELECTOR "$selector"
  put IMAGE "$IMAGE"
  put ARGS "[$json]"
}

# ${manifest//...} would not do: in newer shells & and \ in the replacement have a meaning.
put() {
  local rest="$manifest" filled=""
  while [[ "$rest" == *"\${$1}"* ]]; do
    filled="$filled${rest%%"\${$1}"*}$2"
    rest="${rest#*"\${$1}"}"
  done
  manifest="$filled$rest"
}

selector() { echo "jobset.sigs.k8s.io/jobset-name=$NAME${1:+,batch.kubernetes.io/job-completion-index=$1}"; }

logs() {
  local command=(kubectl logs -n "$NAMESPACE" -l "$(selector "${WORKER:-0}")" --tail=200)
  case "${1:-}" in "") ;; -f | --follow) command+=(-f) ;; *) die "logs takes --follow, not $1" ;; esac
  if [[ -n "$dry_run" ]]; then show "${command[@]}"; else "${command[@]}"; fi
}

status() {
  if [[ -z "$dry_run" ]]; then
    query kubectl get jobset "$NAME" -n "$NAMESPACE" || die "there is no run $NAME in cluster $CLUSTER: launch/gke.sh create"
    printf '%s\n' "$answer"
    kubectl get pods -n "$NAMESPACE" -l "$(selector)" -o wide
  else
    show kubectl get jobset "$NAME" -n "$NAMESPACE"
    show kubectl get pods -n "$NAMESPACE" -l "$(selector)" -o wide
  fi
}

delete() {
  must kubectl delete jobset "$NAME" -n "$NAMESPACE" --ignore-not-found
  if [[ "${POOL:-1}" != 0 ]]; then
    unless "not.?found" gcloud container node-pools delete "$NAME" "${place[@]}" "--cluster=$CLUSTER" --quiet ||
      die "$(why); the node pool may still cost money: look at the console"
  fi
  [[ -n "$dry_run" ]] || say "$NAME is deleted; the checkpoints stay in its workdir"
}

main "$@"
