#!/usr/bin/env bash
# The pictures in this folder: docs/screenshots.sh FOLDER [OTHER], a rollout folder and one to compare it with (needs Debian's chromium).
#   docs/screenshots.sh rollouts/EVAL-…--demo-after rollouts/EVAL-…--demo-before
# Both pages are written anew first: report.png and report-phone.png are FOLDER's report, comparison.png is FOLDER against OTHER.
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "one or two rollout folders are needed: docs/screenshots.sh FOLDER [OTHER]" >&2
    exit 2
fi
python="$root/.venv/bin/python"
folder=$(realpath "$1")

shot() { # shot PAGE WIDTH HEIGHT FILE
    local profile
    profile=$(mktemp -d)
    chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
        --disable-component-update --disable-sync --hide-scrollbars --user-data-dir="$profile" \
        --window-size="$2,$3" --screenshot="$root/docs/$4" "file://$1"
    rm -rf "$profile"
    "$python" -c "from PIL import Image; Image.open('$root/docs/$4').convert('RGB').quantize(256, dither=0).save('$root/docs/$4', optimize=True)"
}

cd "$root"
"$python" -m prismatic.report "$folder"
# a narrower window than 500 is refused: the phone's page stands in a frame
frame=$(mktemp -d)
trap 'rm -rf "$frame"' EXIT
shot "$folder/report.html" 1280 2000 report.png
printf '<body style="margin:0"><iframe src="file://%s" style="width:390px;height:1800px;border:0"></iframe>' \
    "$folder/report.html" > "$frame/phone.html"
shot "$frame/phone.html" 500 1800 report-phone.png
"$python" -c "from PIL import Image; Image.open('docs/report-phone.png').crop((0, 0, 390, 1800)).save('docs/report-phone.png', optimize=True)"
if [ $# -eq 2 ]; then
    other=$(realpath "$2")
    "$python" eval.py --compare "$other" "$folder"
    shot "$folder/compared-with-$(basename "$other").html" 1280 1700 comparison.png
fi
