#!/usr/bin/env bash
# The pictures of the report in this folder: docs/screenshots.sh rollouts/EVAL-…/report.html (needs Debian's chromium). The run was
#   python eval.py --policy expert --task_ids 0 2 --num_trials_per_task 2 --render_quality fast --annotate_videos True
set -euo pipefail
page=$(realpath "$1")
cd "$(dirname "$0")"
shot() { # shot WIDTH HEIGHT FILE
    local profile
    profile=$(mktemp -d)
    chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
        --disable-component-update --disable-sync --hide-scrollbars --user-data-dir="$profile" \
        --window-size="$1,$2" --screenshot="$PWD/$3" "file://$page"
    rm -rf "$profile"
    ../.venv/bin/python -c "from PIL import Image; Image.open('$3').convert('RGB').quantize(256, dither=0).save('$3', optimize=True)"
}
shot 1280 1460 report.png
shot 390 1300 report-phone.png
