#!/usr/bin/env bash
# How checkpoints/openvla-tiny was made, from nothing: expert demonstrations of nine libero_spatial tasks (task 0 is left for the demo), all of the
# small model from random weights, then three more rounds on what the expert would have done after the policy's own steps so far (DAgger), the last
# two with more of the tasks that were weak.
# Ctrl-C and the same command go on from there. train_openvla_tiny.log is what it noted down: seconds, data, losses, weights.
set -euo pipefail
cd "$(dirname "$0")/.."
./setup.sh
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= # two processes on the CPU, also where there is a GPU
python=.venv/bin/python work=${WORKSPACE:-workspace}/openvla-tiny name=libero_spatial_base all="1 2 3 4 5 6 7 8 9"
mkdir -p "$work"
log=$work/recipe.log

stage() { # stage LABEL COMMAND …: run it, note how long it took
    local start=$SECONDS
    "${@:2}"
    echo "$1: $((SECONDS - start)) s" | tee -a "$log"
}
collect() { # collect DATASETS NUMBER OPTION …
    $python collect.py --task_suite_name libero_spatial --data_root_dir "$work/$1" --dataset_name $name --num_workers 2 \
        --num_demos_per_task "$2" --task_ids "${@:3}"
}
train() { # train BASE RUNS DATASETS OPTION …: all of the model, in two processes; then a checkpoint folder of what was learnt beside the runs
    # bfloat16 wants a CPU with instructions for it: where yours has none leave --autocast out, and other weights come out
    $python -m torch.distributed.run --standalone --nproc-per-node 2 finetune.py --vla_path "$1" --use_lora False \
        --data_root_dir "$work/$3" --dataset_name $name --run_root_dir "$2" --cache_dir "$work/cache" \
        --batch_size 8 --autocast bfloat16 --lr_schedule cosine --warmup_steps 100 --max_grad_norm 1.0 --save_steps 500 \
        --num_workers 1 --compile True --augment_order random_resized_crop "${@:4}"
    $python export.py --checkpoint "$(ls -td "$2"/*/latest | head -n 1)" --output "$2-exported" --dtype float32
    { # what a second run must find again
        sed -n '/"data": {/,/}/p' "$2"/*/finetune.json | tr -d '\n ' # the data's content: a tfrecord's own bytes differ from one writing to the next
        echo
        sed -n '1~50p;$p' "$2"/*/metrics.jsonl
        sha256sum "$2-exported/model.safetensors" | sed 's/ .*/ weights/'
    } >>"$log"
}
keep() { # keep OLD NEW: data sets as they are now, for later rounds; NEW is whole or not there
    [ -d "$work/$2" ] && return
    rm -rf "$work/$2.part"
    cp -r "$work/$1" "$work/$2.part"
    mv "$work/$2.part" "$work/$2"
}

[ -d "$work/random" ] || $python checkpoints/make_openvla_tiny.py "$work/random"
if [ ! -d "$work/first-exported" ]; then
    stage "demonstrations of the expert" collect datasets 30 $all
    stage "first training" train "$work/random" "$work/first" datasets --learning_rate 1e-3 --max_steps 3000
fi
keep datasets third-datasets # the expert's alone
if [ ! -d "$work/second-exported" ]; then
    stage "demonstrations that the first policy begins" collect datasets 18 $all --policy_checkpoint "$work/first-exported"
    stage "second training" train "$work/first-exported" "$work/second" datasets --learning_rate 7e-4 --max_steps 3000
fi
if [ ! -d "$work/third-exported" ]; then
    stage "demonstrations that the second policy begins" collect third-datasets 13 $all --policy_checkpoint "$work/second-exported"
    stage "more of them, of tasks 5 to 9" collect third-datasets 19 5 6 7 8 9 --policy_checkpoint "$work/second-exported"
    stage "third training" train "$work/second-exported" "$work/third" third-datasets --learning_rate 7e-4 --max_steps 4600
fi
keep third-datasets fourth-datasets
stage "demonstrations that the third policy begins" collect fourth-datasets 14 $all --policy_checkpoint "$work/third-exported"
stage "more of them, of tasks 5, 6 and 9" collect fourth-datasets 28 5 6 9 --policy_checkpoint "$work/third-exported"
[ -d "$work/fourth-exported" ] || stage "fourth training" train "$work/third-exported" "$work/fourth" fourth-datasets --learning_rate 7e-4 --max_steps 6000
checkpoints/install.sh "$work/fourth-exported" checkpoints/openvla-tiny
$python eval.py --pretrained_checkpoint checkpoints/openvla-tiny --task_ids $all --num_trials_per_task 20 --render_quality fast
