#!/usr/bin/env bash
# Makes the README's picture of the report: two runs of the embedded task, their page, and
# what headless Chromium sees of it. Four minutes of processor time.
set -euo pipefail
picture="$(cd "$(dirname "$0")/.." && pwd)/docs/images/report.png"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
cd "$runs"

for loss in dpo dpop; do
  dpojax train --loss "$loss" --output "$loss"
done
dpojax report dpo/aligned dpop/aligned --output report.html
# Without its sandbox, which root may not have: the page is ours and holds no script.
chromium --headless=new --no-sandbox --hide-scrollbars --window-size=1280,1440 \
  --screenshot="$picture" "file://$runs/report.html"
