#!/usr/bin/env bash
# The whole loop on a laptop's CPU: demonstrations of a task that the small model has never seen, LoRA fine-tuning, evaluation before and after.
#
#   ./demo.sh            20 minutes on 2 cores, 5.4 GB of memory
#   ./demo.sh --quick    a few minutes: shows every stage, learns little
#   ./demo.sh --long     longer: more demonstrations and trials, LIBERO's own rendering
#   ./demo.sh --fresh    forget what an earlier call made (otherwise it goes on from there)
set -euo pipefail
cd "$(dirname "$0")"

demos=40 steps=1000 trials=20 quality=fast name=demo task=0 fresh=
for option in "$@"; do
    case "$option" in
        --quick) demos=4 steps=60 trials=2 name=demo_quick ;;
        --long) demos=80 steps=3000 trials=50 quality=standard name=demo_long ;;
        --fresh) fresh=1 ;;
        *) sed -n '2,9s/^# \{0,1\}//p' "$0"; [ "$option" = --help ] || { echo "error: unknown option $option" >&2; exit 2; }; exit 0 ;;
    esac
done
./setup.sh
if [ "$fresh" ]; then rm -rf "workspace/$name" rollouts/EVAL-libero_spatial-*--"$name"-{before,after}; fi

# Two processes of one thread each learn faster than one of two; a GPU is given to one process.
autocast=auto
if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then processes=1 batch=16; else processes=2 batch=8; fi
if [ $processes = 2 ] && grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then autocast=bfloat16; fi # only with instructions for it is it faster
export OMP_WAIT_POLICY=PASSIVE # a thread that waits must not take the core from the one it waits for
python=.venv/bin/python base=checkpoints/openvla-tiny work=workspace/$name
first=libero_spatial_task$task second=libero_spatial_task${task}_second # data sets: the expert's; with those that the first round began
number=0 times=()
stage() { # stage LABEL COMMAND …: show it, run it, remember how long it took
    local label=$1 start=$SECONDS
    shift
    number=$((number + 1))
    printf '\n== %d of 6, %d s after the start: %s\n' $number $SECONDS "$label"
    "$@"
    times+=("$(printf '%4d s  %s' $((SECONDS - start)) "$label")")
}
show() {
    printf '   %s\n' "$*"
    "$@"
}
collect() { # collect DATASET NUMBER OPTION …
    show $python collect.py --task_suite_name libero_spatial --task_ids $task --num_demos_per_task "$2" \
        --data_root_dir "$work/datasets" --dataset_name "$1" "${@:3}"
}
train() { # train DATASET STEPS; `adapter` is what comes out
    show env OMP_NUM_THREADS=1 $python -m torch.distributed.run --standalone --nproc-per-node $processes finetune.py --vla_path $base \
        --data_root_dir "$work/datasets" --dataset_name "$1" --run_root_dir "$work/runs" --cache_dir "$work/cache" \
        --batch_size $batch --autocast $autocast --learning_rate 2e-3 --lr_schedule cosine --warmup_steps 50 --max_grad_norm 1.0 \
        --max_steps "$2" --save_steps 500 --num_workers 1 --augment_order random_resized_crop --action_statistics base --run_id_note "$name"
    adapter=$(ls -td "$work/runs"/*+"$1"+*/latest | head -n 1) # the newest, should settings have changed since
}
evaluate() { # evaluate CHECKPOINT NOTE
    show $python eval.py --pretrained_checkpoint "$1" --task_suite_name libero_spatial --task_ids $task --num_trials_per_task $trials \
        --render_quality $quality --run_id_note "$name-$2"
}

plan() { printf '  %s  %-52s %-7s %s\n' "$@"; }
printf 'The small base policy has never seen task %s of LIBERO-Spatial and should fail; after fine-tuning it should mostly succeed.\n' $task
printf 'Six stages; the minutes are those of the full demo on 2 CPU cores. Stop at any time: the same command goes on from there.\n'
plan 1 "evaluate the base policy, $trials episodes" "4 min" "rollouts/EVAL-libero_spatial-*--$name-before: a video each"
plan 2 "the scripted expert gives $demos demonstrations" "3 min" "$work/datasets"
plan 3 "fine-tune on them, $((steps / 2)) steps" "3 min" "$work/runs: first_batch.png is what the model sees"
plan 4 "the new policy begins, the expert ends: $((demos * 3 / 5)) more" "3 min" "$work/datasets"
plan 5 "fine-tune on all of them, $steps steps" "5 min" "$work/runs"
plan 6 "evaluate again" "3 min" "rollouts/EVAL-libero_spatial-*--$name-after"
stage "the base policy, which has never seen task $task" evaluate $base before
stage "expert demonstrations → RLDS" collect $first $demos
stage "LoRA fine-tuning, first round" train $first $((steps / 2))
if [ ! -d "$work/datasets/${second}_staged" ]; then
    rm -rf "$work/datasets/copying"
    cp -r "$work/datasets/${first}_staged" "$work/datasets/copying"
    mv "$work/datasets/copying" "$work/datasets/${second}_staged"
fi
stage "demonstrations that the first round's policy begins and the expert ends" collect $second $((demos * 3 / 5)) --policy_checkpoint "$adapter"
stage "LoRA fine-tuning on all of them" train $second $steps
stage "the adapter" evaluate "$adapter" after

printf '\n== result\n'
before=$(ls -td rollouts/EVAL-libero_spatial-*--"$name"-before | head -n 1)
after=$(ls -td rollouts/EVAL-libero_spatial-*--"$name"-after | head -n 1)
$python eval.py --compare "$before" "$after"
printf '%s\n' "" "${times[@]}" "$(printf '%4d s  in all' $SECONDS)"
