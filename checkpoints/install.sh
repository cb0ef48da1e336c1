#!/usr/bin/env bash
# install.sh NEW OLD: put the folder NEW in the place of the checkpoint OLD, whose model card stays. Interrupted, the same call finishes it.
set -euo pipefail
[ -f "$1/README.md" ] || cp "$2/README.md" "$1/"
rm -rf "$2.new"
cp -r "$1" "$2.new"
rm -rf "$2"
mv "$2.new" "$2"
