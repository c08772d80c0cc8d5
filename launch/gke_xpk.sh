#!/usr/bin/env bash
# Runs a verb on TPU slices of a GKE cluster, with xpk:
#
#     launch/gke_xpk.sh --cluster C --name NAME --type TYPE [OPTION...] VERB ARGUMENT...
#     launch/gke_xpk.sh --cluster C --name NAME logs|status|delete
#
#     launch/gke_xpk.sh --cluster birds --name omk --type v6e-16 train --config configs/omk_fill.py
#
# A verb builds an image of what git tracks on a Python image and starts it on every host. xpk queues it, restarts it
# after preemptions and deaths of machines, and gives the machines back when it ends. `delete` stops the run; the
# cluster itself costs money until `xpk cluster delete`.
#
#     --project P        of Google Cloud; default gcloud's
#     --zone Z           default gcloud's
#     --slices N         how many slices of the type (1)
#     --restarts N       how often xpk starts a run again (50)
#     --grace N          seconds that a run has to save when it is taken away (300)
#     --base IMAGE       what the checkout is put upon (python:3.11)
#     --image IMAGE      a ready image with the checkout, installed, in its working folder, instead of building one
#     --env NAME=VALUE   for the verb; repeatable
#     --xpk-flag F       one more flag of `workload create`; repeatable
#     --dry-run          print the commands
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

cluster='' name='' type='' project='' zone='' slices=1 restarts=50 grace=300 base=python:3.11 image=''
environment=() more=()
while (($#)); do
    case $1 in
    --cluster | --name | --type | --project | --zone | --slices | --restarts | --grace | --base | --image)
        need_value "$@"
        declare "${1#--}=$2"
        shift
        ;;
    --env | --xpk-flag)
        need_value "$@"
        if [[ $1 == --env ]]; then environment+=("$2"); else more+=("$2"); fi
        shift
        ;;
    --dry-run) dry_run=true ;;
    --help) usage launch/gke_xpk.sh ;;
    -*) die "option: found '$1', expected one of --help" ;;
    *) break ;;
    esac
    shift
done
check_given --cluster "$cluster"
check_given --name "$name"

workload() {
    need xpk "pip install xpk"
    run xpk workload "$1" "--cluster=$cluster" ${project:+"--project=$project"} ${zone:+"--zone=$zone"} "${@:2}"
}

case ${1-} in
logs)
    need kubectl "install the Google Cloud CLI and its component kubectl"
    run kubectl logs --follow --prefix "--selector=jobset.sigs.k8s.io/jobset-name=$name" --max-log-requests=1000 --tail=-1
    ;;
status) workload list "--filter-by-job=$name" ;;
delete) workload delete "--workload=$name" --force ;;
*)
    check_verb "$@"
    check_given --type "$type"
    check_number --slices "$slices" 1
    check_number --restarts "$restarts" 0
    check_number --grace "$grace" 0
    # xpk runs it in a shell of its own, to which it passes SIGTERM: exec, so that this shell is the verb.
    command=$(quote exec env NABLA_COORDINATOR=auto ${environment[@]+"${environment[@]}"} bash launch/worker.sh "$@")
    if [[ -n $image ]]; then
        source=("--docker-image=$image")
    else
        if ! $dry_run; then
            pack $STATE/nabla_jax.tar.gz
            rm -rf $STATE/image
            mkdir $STATE/image
            tar --extract --file=$STATE/nabla_jax.tar.gz --directory=$STATE/image
        fi
        source=("--base-docker-image=$base" "--script-dir=$STATE/image")
        command="bash launch/install.sh tpu && $command"
    fi
    workload create "--workload=$name" "--tpu-type=$type" "--num-slices=$slices" "${source[@]}" \
        "--max-restarts=$restarts" "--termination-grace-period-seconds=$grace" ${more[@]+"${more[@]}"} \
        "--command=$command"
    ;;
esac
