#!/usr/bin/env bash
# How checkpoints/openvla-tiny was made, from nothing: expert demonstrations of nine libero_spatial tasks (task 0 is left for the demo), all of the
# small model from random weights, then a second round on what the expert would have done after the first round's own steps (DAgger).
# Ctrl-C and the same command go on from there. train_openvla_tiny.log is what it noted down: seconds, data, losses, weights.
set -euo pipefail
cd "$(dirname "$0")/.."
./setup.sh
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= # two processes on the CPU, also where there is a GPU
python=.venv/bin/python work=${WORKSPACE:-workspace}/openvla-tiny name=libero_spatial_base
mkdir -p "$work"
log=$work/recipe.log

stage() { # stage LABEL COMMAND …: run it, note how long it took
    local start=$SECONDS
    "${@:2}"
    echo "$1: $((SECONDS - start)) s" | tee -a "$log"
}
collect() {
    $python collect.py --task_suite_name libero_spatial --task_ids 1 2 3 4 5 6 7 8 9 --data_root_dir "$work/datasets" --dataset_name $name \
        --num_workers 2 "$@"
}
train() { # train BASE RUNS OPTION …: all of the model, in two processes; then a checkpoint folder of what was learnt beside the runs
    # bfloat16 wants a CPU with instructions for it: where yours has none leave --autocast out, and other weights come out
    $python -m torch.distributed.run --standalone --nproc-per-node 2 finetune.py --vla_path "$1" --use_lora False \
        --data_root_dir "$work/datasets" --dataset_name $name --run_root_dir "$2" --cache_dir "$work/cache" \
        --batch_size 8 --autocast bfloat16 --lr_schedule cosine --warmup_steps 100 --max_grad_norm 1.0 --save_steps 500 \
        --num_workers 1 --augment_order random_resized_crop "${@:3}"
    $python export.py --checkpoint "$(ls -td "$2"/*/latest | head -n 1)" --output "$2-exported" --dtype float32
    { # what a second run must find again
        cat "$work/datasets/$name"/1.0.0/*.tfrecord* | sha256sum | sed 's/ .*/ data/'
        sed -n '1~50p;$p' "$2"/*/metrics.jsonl
        sha256sum "$2-exported/model.safetensors" | sed 's/ .*/ weights/'
    } >>"$log"
}

[ -d "$work/random" ] || $python checkpoints/make_openvla_tiny.py "$work/random"
if [ ! -d "$work/first-exported" ]; then
    stage "demonstrations of the expert" collect --num_demos_per_task 30
    stage "first training" train "$work/random" "$work/first" --learning_rate 1e-3 --max_steps 3500
fi
stage "demonstrations that the first policy begins" collect --num_demos_per_task 20 --policy_checkpoint "$work/first-exported"
[ -d "$work/second-exported" ] || stage "second training" train "$work/first-exported" "$work/second" --learning_rate 7e-4 --max_steps 4000
checkpoints/install.sh "$work/second-exported" checkpoints/openvla-tiny
$python eval.py --pretrained_checkpoint checkpoints/openvla-tiny --task_ids 1 2 3 4 5 6 7 8 9 --num_trials_per_task 20 --render_quality fast
