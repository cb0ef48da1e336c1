#!/usr/bin/env bash
# The whole loop on a laptop's CPU: demonstrations of a task that the small model has never seen, LoRA fine-tuning, evaluation before and after.
#
#   ./demo.sh            not timed in one go; its stages took 27 minutes on 2 cores shared with other jobs
#   ./demo.sh --quick    a few minutes: shows every stage, learns little
#   ./demo.sh --long     longer: more demonstrations and trials, LIBERO's own rendering
#   ./demo.sh --fresh    forget what an earlier call made (otherwise it goes on from there)
set -euo pipefail
cd "$(dirname "$0")"

demos=40 steps=1500 trials=20 quality=fast name=demo task=0
for option in "$@"; do
    case "$option" in
        --quick) demos=4 steps=60 trials=2 name=demo_quick ;;
        --long) demos=80 steps=3000 trials=50 quality=standard name=demo_long ;;
        --fresh) fresh=1 ;;
        *) sed -n '2,9s/^# \{0,1\}//p' "$0"; [ "$option" = --help ] || { echo "error: unknown option $option" >&2; exit 2; }; exit 0 ;;
    esac
done
./setup.sh
if [ "${fresh:-}" ]; then rm -rf "workspace/$name" rollouts/EVAL-libero_spatial-*--"$name"-{before,after}; fi

# Two processes of one thread each learn faster than one of two; a GPU is given to one process.
autocast=auto
if [ -e /dev/nvidiactl ]; then processes=1 batch=16; else processes=2 batch=8; fi
if [ $processes = 2 ] && grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then autocast=bfloat16; fi # only with instructions for it is it faster
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

collect() {
    .venv/bin/python collect.py --task_suite_name libero_spatial --task_ids $task --num_demos_per_task $demos \
        --data_root_dir "workspace/$name/datasets" --dataset_name libero_spatial_task$task "$@"
}
stage "expert demonstrations of task $task → RLDS" collect
stage "as many that the base policy begins and the expert ends" collect --policy_checkpoint $base
stage "the base policy before" .venv/bin/python eval.py --pretrained_checkpoint $base \
    --task_suite_name libero_spatial --task_ids $task --num_trials_per_task $trials --render_quality $quality --run_id_note "$name-before"
stage "LoRA fine-tuning" env OMP_NUM_THREADS=1 .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node $processes \
    finetune.py --vla_path $base \
    --data_root_dir "workspace/$name/datasets" --dataset_name libero_spatial_task$task --run_root_dir "$run" --cache_dir "workspace/$name/cache" \
    --batch_size $batch --learning_rate 2e-3 --autocast $autocast --lr_schedule cosine --warmup_steps 50 --max_grad_norm 1.0 --max_steps $steps --save_steps 500 \
    --num_workers 1 --augment_order random_resized_crop --action_statistics base --run_id_note "$name"
adapter=$(ls -td "$run"/*/latest | head -n 1) # the newest, should settings have changed since
stage "the adapter after" .venv/bin/python eval.py --pretrained_checkpoint "$adapter" \
    --task_suite_name libero_spatial --task_ids $task --num_trials_per_task $trials --render_quality $quality --run_id_note "$name-after"

printf '\n== result\n'
before=$(ls -td rollouts/EVAL-libero_spatial-*--"$name"-before | head -n 1)
after=$(ls -td rollouts/EVAL-libero_spatial-*--"$name"-after | head -n 1)
.venv/bin/python eval.py --compare "$before" "$after"
printf '%s\n' "" "${times[@]}" "$(printf '%4d s  in all' $SECONDS)"
