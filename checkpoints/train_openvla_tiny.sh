#!/usr/bin/env bash
# How checkpoints/openvla-tiny was made: expert demonstrations of four libero_spatial tasks, all of the small model from random weights, then
# a second round on what the expert would have done after the first round's own steps (DAgger). On 2 CPU cores shared with other work: 17
# minutes of collecting, 24 of training, 9 of collecting, 13 of training. The CPU has bfloat16 instructions; where yours has none leave
# --autocast out. Ctrl-C and the same command go on from there. The weights come out alike, not equal: the checkpoint that is here had its
# first 3,114 steps on a schedule of 8,000, two episodes of task 7 in its second round, and demonstrations that were not yet held back when
# they begin to lift.
set -euo pipefail
cd "$(dirname "$0")/.."
./setup.sh
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= # two processes on the CPU, also where there is a GPU
python=.venv/bin/python work=workspace/openvla-tiny name=libero_spatial_base
[ -d $work/random ] || $python checkpoints/make_openvla_tiny.py $work/random

train() { # train BASE RUNS OPTION …: all of the model, in two processes; then a checkpoint folder of what was learnt beside the runs
    local base=$1 runs=$2
    shift 2
    $python -m torch.distributed.run --standalone --nproc-per-node 2 finetune.py --vla_path "$base" --use_lora False \
        --data_root_dir $work/datasets --dataset_name $name --run_root_dir "$runs" --cache_dir $work/cache \
        --batch_size 8 --autocast bfloat16 --lr_schedule cosine --warmup_steps 100 --max_grad_norm 1.0 --save_steps 1000 \
        --num_workers 1 --augment_order random_resized_crop "$@"
    [ -d "$runs-exported" ] ||
        $python export.py --checkpoint "$(ls -td "$runs"/*/latest | head -n 1)" --output "$runs-exported" --dtype float32
}

collect() { $python collect.py --task_suite_name libero_spatial --data_root_dir $work/datasets --dataset_name $name --num_workers 2 "$@"; }

if [ ! -d $work/first-exported ]; then
    collect --task_ids 1 2 5 7 --num_demos_per_task 72
    train $work/random $work/first --learning_rate 1e-3 --max_steps 6000
fi
collect --task_ids 1 2 5 --num_demos_per_task 25 --policy_checkpoint $work/first-exported
train $work/first-exported $work/second --learning_rate 6e-4 --max_steps 2500
cp checkpoints/openvla-tiny/README.md $work/second-exported/ # the model card
rm -rf checkpoints/openvla-tiny && cp -r $work/second-exported checkpoints/openvla-tiny
$python eval.py --pretrained_checkpoint checkpoints/openvla-tiny --task_ids 1 2 5 7 --num_trials_per_task 10 --render_quality fast
