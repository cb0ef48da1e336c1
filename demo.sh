#!/usr/bin/env bash
# The whole loop on a laptop's CPU: demonstrations of a task that the small model has never seen, LoRA fine-tuning, evaluation before and after.
#
#   ./demo.sh            at most 5 GB of memory; not timed in one go yet, its stages took 28 minutes on 2 shared cores
#   ./demo.sh --quick    339 s on 2 shared cores: shows every stage, learns little
#   ./demo.sh --long     longer: more demonstrations and trials, LIBERO's own rendering
#   ./demo.sh --fresh    forget what an earlier call made (otherwise it goes on from there)
set -euo pipefail
cd "$(dirname "$0")"

demos=50 steps=1000 trials=20 quality=fast name=demo task=0
for option in "$@"; do
    case "$option" in
        --quick) demos=6 steps=60 trials=2 name=demo_quick ;;
        --long) demos=100 steps=3000 trials=50 quality=standard name=demo_long ;;
        --fresh) fresh=1 ;;
        *) sed -n '2,9s/^# \{0,1\}//p' "$0"; [ "$option" = --help ] || { echo "error: unknown option $option" >&2; exit 2; }; exit 0 ;;
    esac
done
./setup.sh
if [ "${fresh:-}" ]; then rm -rf "workspace/$name" rollouts/EVAL-libero_spatial-*--"$name"-{before,after}; fi

export OMP_WAIT_POLICY=PASSIVE # a thread that waits must not take the core from the one it waits for
base=checkpoints/openvla-tiny
run=workspace/$name/runs
times=()
stage() { # stage NAME COMMAND …: run it, remember how long it took
    local label=$1 start=$SECONDS
    shift
    printf '\n== %s\n   %s\n' "$label" "$*"
    "$@"
    times+=("$(printf '%4d s  %s' $((SECONDS - start)) "$label")")
}

stage "expert demonstrations of task $task → RLDS" .venv/bin/python collect.py \
    --task_suite_name libero_spatial --task_ids $task --num_demos_per_task $demos \
    --data_root_dir "workspace/$name/datasets" --dataset_name libero_spatial_task$task
stage "the base policy before" .venv/bin/python eval.py --pretrained_checkpoint $base \
    --task_suite_name libero_spatial --task_ids $task --num_trials_per_task $trials --render_quality $quality --run_id_note "$name-before"
stage "LoRA fine-tuning" env OMP_NUM_THREADS=1 .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 \
    finetune.py --vla_path $base \
    --data_root_dir "workspace/$name/datasets" --dataset_name libero_spatial_task$task --run_root_dir "$run" --cache_dir "workspace/$name/cache" \
    --batch_size 8 --learning_rate 2e-3 --lr_schedule cosine --warmup_steps 50 --max_grad_norm 1.0 --max_steps $steps --save_steps 500 \
    --num_workers 1 --augment_order random_resized_crop --action_statistics base --run_id_note "$name"
adapter=$(ls -td "$run"/*/latest | head -n 1) # the newest, should settings have changed since
stage "the adapter after" .venv/bin/python eval.py --pretrained_checkpoint "$adapter" \
    --task_suite_name libero_spatial --task_ids $task --num_trials_per_task $trials --render_quality $quality --run_id_note "$name-after"

printf '\n== result\n'
before=$(ls -td rollouts/EVAL-libero_spatial-*--"$name"-before | head -n 1)
after=$(ls -td rollouts/EVAL-libero_spatial-*--"$name"-after | head -n 1)
.venv/bin/python eval.py --compare "$before" "$after"
printf '%s\n' "" "${times[@]}" "$(printf '%4d s  in all' $SECONDS)"
