#!/usr/bin/env bash
# Runs a verb on machines that SkyPilot finds in any cloud, or in Kubernetes:
#
#     launch/skypilot.sh --name NAME [OPTION...] VERB ARGUMENT...
#     launch/skypilot.sh --name NAME [--managed] logs|stop|delete
#
#     launch/skypilot.sh --name birds --accelerators H100:8 --nodes 2 train --config configs/omk_fill.py
#
# A verb starts the machines or uses those that are there, copies the folder, installs it, and shows the log. Ctrl-C
# ends the showing, not the run: logs shows it again, stop ends it, delete removes the machines, which cost money until
# then.
#
#     --accelerators A   of each node (H100:8)
#     --nodes N          how many (1)
#     --infra I          where: aws, gcp/us-central1, kubernetes, ...
#     --spot             cheap, and taken away at any moment
#     --managed          SkyPilot watches the run, starts it again elsewhere after a preemption, and removes its machines
#     --idle N           minutes without work after which the machines are removed (30); not with --managed
#     --kind K           cuda, tpu or cpu: what is installed (cuda)
#     --env NAME=VALUE   for the verb; repeatable
#     --dry-run          print the commands
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

name='' accelerators=H100:8 nodes=1 infra='' idle=30 kind=cuda
spot=false managed=false environment=()
while (($#)); do
    case $1 in
    --name | --accelerators | --nodes | --infra | --idle | --kind)
        need_value "$@"
        declare "${1#--}=$2"
        shift
        ;;
    --env)
        need_value "$@"
        environment+=(--env "$2")
        shift
        ;;
    --spot) spot=true ;;
    --managed) managed=true ;;
    --dry-run) dry_run=true ;;
    --help) usage launch/skypilot.sh ;;
    -*) die "option: found '$1', expected one of --help" ;;
    *) break ;;
    esac
    shift
done
check_given --name "$name"
need sky "pip install skypilot"

case ${1-} in
logs)
    if $managed; then run sky jobs logs --name "$name"; else run sky logs "$name"; fi
    ;;
stop)
    if $managed; then run sky jobs cancel --name "$name" --yes; else run sky cancel "$name" --all --yes; fi
    ;;
delete)
    ! $managed || die "delete: found --managed, whose machines SkyPilot removes itself; expected stop"
    run sky down "$name" --yes
    ;;
*)
    check_verb "$@"
    check_number --nodes "$nodes" 1
    check_number --idle "$idle" 0
    words=$(quote "$@")
    flags=(--gpus "$accelerators" --num-nodes "$nodes" --env "NABLA_KIND=$kind" --env "NABLA_RUN=$words")
    [[ -z $infra ]] || flags+=(--infra "$infra")
    ! $spot || flags+=(--use-spot)
    flags+=(${environment[@]+"${environment[@]}"} launch/skypilot.yaml)
    if $managed; then
        run sky jobs launch --name "$name" --yes "${flags[@]}"
    else
        run sky launch --cluster "$name" --yes --idle-minutes-to-autostop "$idle" --down "${flags[@]}"
        $dry_run || echo "$name costs money until: launch/skypilot.sh --name $name delete (or --idle minutes without work)" >&2
    fi
    ;;
esac
