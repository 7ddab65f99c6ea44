#!/bin/sh
# The commit that a result is of: HEED_COMMIT, for machines without git, or what git says. -dirty:
# something other than results has changed since.
cd "$(dirname "$0")/.." || exit 1
if [ -n "$HEED_COMMIT" ]; then
  echo "$HEED_COMMIT"
elif commit=$(git rev-parse --short HEAD 2>/dev/null); then
  changed=$(git status --porcelain --untracked-files=no -- . ':!benchmarks/results')
  echo "$commit${changed:+-dirty}"
else
  echo unknown
fi
