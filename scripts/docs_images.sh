#!/usr/bin/env bash
# Redraws the figures of docs/look.md: of the embedded model and its data, the app in a headless Chromium.
#   bash scripts/docs_images.sh
# Needs what `make test-browser` needs.
set -euo pipefail
cd "$(dirname "$0")/.."
model=${MODEL:-data/tiny-llava}
work=runs/docs
out=docs/images
bin=.venv/bin
export OMP_NUM_THREADS=1
mkdir -p "$out"
$bin/python -m data.shapes --out $work/shapes --train 2 --eval 40
images=$work/shapes/images/eval
budget="--dominant 13 --contextual 3"
$bin/visionzip visualize "$model" $images --limit 3 $budget --out $work/look.html
cp $work/look/000000.jpg.kept.png $out/kept.png
cp $work/look/000000.jpg.attention.png $out/attention.png
$bin/visionzip analyze "$model" $images $budget --out $work/analysis
for name in spread budget layers agreement layer_maps; do cp $work/analysis/$name.png $out/analysis-$name.png; done
$bin/visionzip benchmark "$model" --budgets all,32,16,8 --batches 1,8 --turns 2 --repeats 5 --plot $out/benchmark.png --json $work/benchmark.json
chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome)
for scheme in light dark; do
  $chromium --headless=new --no-sandbox --disable-gpu --disable-background-networking --hide-scrollbars --virtual-time-budget=15000 \
    --blink-settings=preferredColorScheme=$([ $scheme = dark ] && echo 0 || echo 1) --window-size=1400,1180 \
    --screenshot=$out/page-$scheme.png "file://$PWD/$work/look.html" 2>/dev/null
done
SCREENSHOTS=$out MODEL="$model" IMAGE=$images/000000.jpg QUESTION="How many shapes are there?" \
  $bin/python -m pytest -q tests/app/browser_app.py
