#!/usr/bin/env bash
# The whole loop on a laptop's CPU: demonstrations of a task that the small model has never seen, LoRA fine-tuning, evaluation before and after.
#
#   ./demo.sh            OpenVLA: an action is seven tokens, one after the other
#   ./demo.sh --oft      OpenVLA-OFT: eight actions in one forward pass, by regression; learns in two rounds
#   ./demo.sh --quick    a few minutes: shows every stage, learns little (also with --oft)
#   ./demo.sh --long     more demonstrations and trials, LIBERO's own rendering (also with --oft)
#   ./demo.sh --fresh    forget what an earlier call made (otherwise it goes on from there)
set -Eeuo pipefail
cd "$(dirname "$0")"
trap 'echo "stopped: the same command goes on from there, with --fresh from the start (as after a change of the base or of the code)" >&2' ERR

head=tokens size= fresh=
for option in "$@"; do
    case "$option" in
        --oft) head=oft ;;
        --quick | --long) size=_${option#--} ;;
        --fresh) fresh=1 ;;
        *) sed -n '2,10s/^# \{0,1\}//p' "$0"; [ "$option" = --help ] || { echo "error: unknown option $option" >&2; exit 2; }; exit 0 ;;
    esac
done
# demos: of the expert; more: begun by a policy, ended by the expert (DAgger); steps of training; episodes before and after
# first: steps of a training before, on the expert's demonstrations alone, whose adapter begins the others and is the next one's base; 0: the base does
case $head$size in
    tokens) demos=24 more=20 first=0 steps=600 before=10 after=20 quality=fast ;;
    oft) demos=18 more=16 first=130 steps=140 before=10 after=20 quality=fast ;;
    tokens_quick) demos=4 more=2 first=0 steps=40 before=1 after=2 quality=fast ;;
    oft_quick) demos=4 more=2 first=20 steps=40 before=1 after=2 quality=fast ;;
    tokens_long) demos=80 more=60 first=0 steps=3000 before=50 after=50 quality=standard ;;
    oft_long) demos=80 more=60 first=600 steps=2000 before=50 after=50 quality=standard ;;
esac
name=demo_$head$size task=0 base=checkpoints/openvla-tiny push=0.5
# a chunk is learnt from the eight actions that were done next: nothing pushes the expert off its way
if [ $head = oft ]; then base=checkpoints/openvla-tiny-oft push=0; fi
./setup.sh
if [ "$fresh" ]; then rm -rf "workspace/$name" rollouts/EVAL-libero_spatial-*--"$name"-{expert,before,after}; fi

# Two processes of one thread each learn faster than one of two; a GPU is given to one process.
autocast=auto
if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    processes=1 batch=16
else
    processes=2 batch=8
    export CUDA_VISIBLE_DEVICES= # a card that torch can't use is passed over, which elsewhere is an error
fi
if [ $processes = 2 ] && grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then autocast=bfloat16; fi # only with instructions for it is it faster
export OMP_WAIT_POLICY=PASSIVE # a thread that waits must not take the core from the one it waits for
python=.venv/bin/python work=workspace/$name dataset=libero_spatial_task$task
number=0 times=()
stage() { # stage LABEL COMMAND …: show it, run it, remember how long it took
    local label=$1 start=$SECONDS
    shift
    number=$((number + 1))
    printf '\n== %d, %d s after the start: %s\n' $number $SECONDS "$label"
    "$@"
    times+=("$(printf '%4d s  %s' $((SECONDS - start)) "$label")")
}
show() {
    printf '   %s\n' "$*"
    "$@"
}
collect() { # collect NAME NUMBER OPTION …
    show $python collect.py --task_suite_name libero_spatial --task_ids $task --num_demos_per_task "$2" --perturbation $push \
        --data_root_dir "$work/datasets" --dataset_name "$1" "${@:3}"
}
train() { # train NAMES STEPS NOTE; `adapter` is what comes out
    show env OMP_NUM_THREADS=1 $python -m torch.distributed.run --standalone --nproc-per-node $processes finetune.py --vla_path $base \
        --data_root_dir "$work/datasets" --dataset_name "$1" --run_root_dir "$work/runs" --cache_dir "$work/cache" \
        --batch_size $batch --autocast $autocast --learning_rate 2e-3 --lr_schedule cosine --warmup_steps 50 --max_grad_norm 1.0 \
        --max_steps "$2" --save_steps 500 --num_workers 1 --augment_order random_resized_crop --action_statistics base --run_id_note "$3"
    adapter=$(ls -td "$work/runs"/*--"$3"--*/latest | head -n 1) # the newest, should settings have changed since
}
evaluate() { # evaluate NOTE EPISODES OPTION …; `rollouts` is what comes out
    show $python eval.py --task_suite_name libero_spatial --task_ids $task --num_trials_per_task "$2" --render_quality $quality \
        --run_id_note "$name-$1" "${@:3}"
    rollouts=$(ls -td rollouts/EVAL-libero_spatial-*--"$name-$1" | head -n 1)
}

cat <<EOF
The small base policy ($base) has never seen task $task of LIBERO-Spatial and should fail; after fine-tuning it should mostly succeed.
Stop at any time: the same command goes on from there. What comes, with its place:
  the scripted expert, one episode to watch first        rollouts/EVAL-…--$name-expert: a video
  the base policy, $before episodes                             rollouts/EVAL-…--$name-before
  $((demos + more)) demonstrations of the expert                         $work/datasets
  LoRA fine-tuning (--oft: twice)                        $work/runs: first_batch.png is what the model sees
  the adapter, $after episodes, and the two compared       rollouts/EVAL-…--$name-after
EOF

stage "the expert, one episode" evaluate expert 1 --policy expert
printf '\n>> watch it: %s\n' "$(ls "$rollouts"/*.mp4 | head -n 1)"
stage "the base policy, which has never seen task $task" evaluate before $before --pretrained_checkpoint $base --video_every 5
before_folder=$rollouts
stage "$demos demonstrations of the expert → RLDS" collect $dataset $demos
leader="the base policy" more_data=$dataset data=$dataset
if [ $first -gt 0 ]; then
    stage "LoRA fine-tuning on these" train $dataset $first "$name-first"
    [ -d "$work/first-$first" ] || show $python export.py --checkpoint "$adapter" --output "$work/first-$first" --dtype float32
    base=$work/first-$first leader="the first adapter" # from which the second one goes on
    more_data=${dataset}_led data=$dataset,${dataset}_led # what has been learnt from stays as it was, should this go on later
fi
stage "$more more that $leader begins and the expert ends" collect $more_data $more --policy_checkpoint $base
stage "LoRA fine-tuning" train $data $steps "$name"
stage "the adapter" evaluate after $after --pretrained_checkpoint "$adapter" --video_every 5

printf '\n== result: the base policy, then the adapter, on the same initial states\n'
$python eval.py --compare "$before_folder" "$rollouts"
sheet=$work/before_and_after.png
$python docs/success_and_failure.py "$sheet" "$before_folder" "$rollouts"
printf '\n>> look at it: %s (a failure before, a success after where there is one) and %s/report.html\n' "$sheet" "$rollouts"
printf '%s\n' "" "${times[@]}" "$(printf '%4d s  in all' $SECONDS)"
