#!/usr/bin/env bash
# Runs a verb on every worker of a Cloud TPU VM, with gcloud:
#
#     launch/tpu_vm.sh --name NAME --zone ZONE --type TYPE [OPTION...] VERB ARGUMENT...
#     launch/tpu_vm.sh --name NAME --zone ZONE logs|stop|delete
#
#     launch/tpu_vm.sh --name birds --zone us-east5-b --type v6e-8 --spot train --config configs/omk_fill.py
#
# A verb creates the TPU or uses the one that is there, copies this checkout (what git tracks), installs it, starts the
# verb on all workers, and follows their logs. Ctrl-C ends the following, not the run: logs follows it again, stop lets
# it save and end, delete removes the TPU, which costs money until then.
#
#     --project P        of Google Cloud; default gcloud's
#     --version V        software of the TPU; default that of its type
#     --spot             cheap, and taken away at any moment; the same command creates it again and continues
#     --create-flag F    one more flag of `tpu-vm create`; repeatable
#     --repository URL   clone this instead of copying the checkout, and
#     --ref REF          check out this branch, tag or commit (main)
#     --setup FILE       a script that every worker runs before the verb, e.g. to mount what all of them share
#     --env NAME=VALUE   for the verb; repeatable
#     --delete-after     delete the TPU when the run has ended well
#     --dry-run          print the commands
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

name='' zone='' type='' project='' version='' repository='' ref=main setup=''
spot=false delete_after=false create_flags=() environment=()
while (($#)); do
    case $1 in
    --name | --zone | --type | --project | --version | --repository | --ref | --setup)
        need_value "$@"
        declare "${1#--}=$2"
        shift
        ;;
    --create-flag | --env)
        need_value "$@"
        if [[ $1 == --env ]]; then environment+=("$2"); else create_flags+=("$2"); fi
        shift
        ;;
    --spot) spot=true ;;
    --delete-after) delete_after=true ;;
    --dry-run) dry_run=true ;;
    --help) usage launch/tpu_vm.sh ;;
    -*) die "option: found '$1', expected one of --help" ;;
    *) break ;;
    esac
    shift
done
check_given --name "$name"
check_given --zone "$zone"
need gcloud "install the Google Cloud CLI"

where=("--zone=$zone" ${project:+"--project=$project"})
tpu() {
    run gcloud compute tpus tpu-vm "$1" "$name" "${where[@]}" "${@:2}"
}
# What all workers do, in the folder of the checkout.
everywhere() {
    tpu ssh --worker=all "--command=cd nabla_jax && $1"
}

create() {
    local state='' flags=("--accelerator-type=$type" "--version=$version")
    ! $spot || flags+=(--spot)
    if $dry_run; then
        tpu describe '--format=value(state)'
    else
        # An error is most often that there is none; any other one comes again at once.
        state=$(tpu describe '--format=value(state)' 2>/dev/null) || state=
    fi
    case $state in
    READY)
        echo "$name: using the TPU that is there"
        return
        ;;
    STOPPED)
        tpu start
        return
        ;;
    PREEMPTED | TERMINATED) tpu delete --quiet ;;
    '') ;;
    *) die "$name: found state $state, expected READY; wait, or delete it" ;;
    esac
    tpu create "${flags[@]}" ${create_flags[@]+"${create_flags[@]}"}
}

copy() {
    if [[ -n $repository ]]; then
        local url target
        url=$(quote "$repository") target=$(quote "$ref")
        tpu ssh --worker=all "--command=test -d nabla_jax || git clone --no-checkout $url nabla_jax"
        everywhere "git fetch origin $target && git checkout --detach FETCH_HEAD"
    else
        $dry_run || pack $STATE/nabla_jax.tar.gz
        run gcloud compute tpus tpu-vm scp $STATE/nabla_jax.tar.gz "$name:" "${where[@]}" --worker=all
        tpu ssh --worker=all "--command=mkdir -p nabla_jax && tar -xzf nabla_jax.tar.gz -C nabla_jax"
    fi
    [[ -z $setup ]] || run gcloud compute tpus tpu-vm scp "$setup" "$name:nabla_jax_setup.sh" "${where[@]}" --worker=all
}

follow() {
    everywhere 'launch/background.sh follow'
}

case ${1-} in
logs) follow ;;
stop) everywhere 'launch/background.sh stop' ;;
delete) tpu delete --quiet ;;
*)
    check_verb "$@"
    check_given --type "$type"
    [[ -z $setup || -f $setup ]] || die "--setup: found no file $setup"
    case $type in
    v6e-*) version=${version:-v2-alpha-tpuv6e} ;;
    v5p-*) version=${version:-v2-alpha-tpuv5} ;;
    v5litepod-*) version=${version:-v2-alpha-tpuv5-lite} ;;
    *) version=${version:-tpu-ubuntu2204-base} ;;
    esac
    # Before anything costs money.
    start=$(quote env NABLA_COORDINATOR=auto ${environment[@]+"${environment[@]}"} launch/background.sh start "$@")
    create
    copy
    everywhere "${setup:+bash ../nabla_jax_setup.sh && }launch/install.sh tpu"
    everywhere "$start"
    status=0
    follow || status=$?
    if $delete_after && ((!status)); then
        tpu delete --quiet
    elif ! $dry_run; then
        echo "$name costs money until: launch/tpu_vm.sh --name $name --zone $zone delete" >&2
    fi
    exit "$status"
    ;;
esac
