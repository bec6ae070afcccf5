#!/usr/bin/env bash
# Measure on a GPU machine that has nothing but Python 3.12, torch and torchvision, and reaches no registry.
#
#     tools/gpu_run.sh WHEELS OUT
#
# WHEELS: folder filled by tools/gpu_wheels.py. OUT: folder for one archive, gpu-reports.tar.gz, under 16 MB.
# First the GPU rows of the benchmark (stopped after seven minutes; its tables are written as they are measured), then `imaginet reproduce --profile gpu`. The archive holds their tables, figures
# and executed notebooks, with a log. It is packed every 30 seconds, and when this script ends or is stopped, so that
# nothing is lost on a machine that is taken away. A second call on the same machine continues; to begin anew, delete
# build/gpu and reports/gpu. The first call moves reports that are already there to build/before_gpu. Other profiles: BENCHMARK=name, PROFILE=name (or the path of a YAML file).
# Exit status: 0 if both parts ended well, 143 or 130 if stopped, else that of the part that failed.
set -uo pipefail
[ $# = 2 ] || { sed -n '4,7s/^# *//p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
wheels=$(cd "$1" 2>/dev/null && pwd) || { echo "$1: no such folder; fill it with tools/gpu_wheels.py" >&2; exit 2; }
compgen -G "$wheels/*.whl" > /dev/null || { echo "$wheels: no wheels; fill it with tools/gpu_wheels.py" >&2; exit 2; }
mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 2
benchmark=${BENCHMARK:-benchmark-gpu} profile=${PROFILE:-gpu}
[[ $benchmark == *.y*ml ]] && benchmark=$(realpath "$benchmark")
[[ $profile == *.y*ml ]] && profile=$(realpath "$profile")
cd "$root" || exit 2
work=build/gpu site=$root/build/gpu/site archive=$out/gpu-reports.tar.gz
reports=(reports/"$(basename "${benchmark%.y*ml}")" reports/"$(basename "${profile%.y*ml}")")
logs=${reports[1]}/logs
# results that came with the checkout would pass for measured here: snakemake keeps those that are made from no other file (p63)
for folder in "${reports[@]}"; do
    [ ! -e "$logs" ] && [ -e "$folder" ] || continue
    mkdir -p build/before_gpu && mv "$folder" "build/before_gpu/$(basename "$folder").$(date +%s)" || exit 2
done
mkdir -p "$work" "$logs"

say() { printf '%s %5d s  %s\n' "$(date +%H:%M:%S)" "$SECONDS" "$*" | tee -a "$logs/gpu_run.log"; }

# what a report needs; checkpoints and predictions stay behind, and pages, which the notebooks give again, if it grows too large
pack() {
    local partial=$out/.partial.$BASHPID left_out=(-name checkpoints -o -name predictions -o -name manifests)
    for more in '' '*.html' '*.pdf'; do
        [ -z "$more" ] || left_out+=(-o -name "$more")
        find "${reports[@]}" \( "${left_out[@]}" \) -prune -o -type f -print0 2> /dev/null |
            tar --null --files-from=- --ignore-failed-read -czf "$partial" 2> /dev/null # files come and go meanwhile
        [ "$(stat -c %s "$partial")" -gt 16000000 ] || break
    done
    mv "$partial" "$archive"
}

child='' packer='' status=0
stop() { # pack before anything else: who sent the signal may not wait
    trap '' TERM INT
    say "stopped by a signal"
    pack
    [ -z "$child" ] || { kill -TERM -- "-$child"; timeout --signal=KILL 10 tail --pid="$child" -f /dev/null; kill -KILL -- "-$child"; } 2> /dev/null
    exit "$1"
}
finish() {
    [ -z "$packer" ] || kill "$packer" 2> /dev/null
    pack
    rm -f "$out"/.partial.*
}
trap 'stop 143' TERM
trap 'stop 130' INT
trap finish EXIT

# a part runs as a group of processes of its own, so that all of it can be stopped; its lines get times
part() { # NAME COMMAND...
    local name=$1; shift
    say "$name: begins"
    setsid "$@" > >(while IFS= read -r line || [ -n "$line" ]; do say "$line"; done) 2>&1 < /dev/null &
    child=$!
    echo "$child" > "$work/running"
    wait "$child"; local code=$?
    child=''
    rm -f "$work/running"
    say "$name: ends with exit status $code"
    return "$code"
}

# a call that was killed outright could not end what it had started
left=$(cat "$work/running" 2> /dev/null || true)
if [ -n "$left" ] && grep -qa imaginet "/proc/$left/cmdline" 2> /dev/null; then
    say "ending what an earlier call left running"
    { kill -TERM -- "-$left"; timeout 10 tail --pid="$left" -f /dev/null; kill -KILL -- "-$left"; } 2> /dev/null
fi
rm -f "$out"/.partial.* "$work/running"
(while sleep 30 && kill -0 $$; do pack; done) < /dev/null &> /dev/null & # nobody waits for this one's output
packer=$!

install() {
    local mark; mark=$(cd "$wheels" && sha256sum ./*.whl | sha256sum)
    if [ "$mark" != "$(cat "$work/installed" 2> /dev/null)" ]; then
        rm -rf "$site"
        python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
            --target "$site" "$wheels"/*.whl || return
    fi
    # the checkout is used as it is; its command is the one that settings.ini names
    mkdir -p "$site/bin" && python3 - "$site/bin" << 'PYTHON' || return
import sys
from configparser import ConfigParser
from pathlib import Path
settings = ConfigParser(delimiters=["="])
settings.read("settings.ini", encoding="utf-8")
name, _, target = settings["DEFAULT"]["console_scripts"].partition("=")
module, _, function = target.strip().partition(":")
command = Path(sys.argv[1])/name.strip()
command.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n")
command.chmod(0o755)
PYTHON
    echo "$mark" > "$work/installed"
}

machine() {
    echo "commit: $(git rev-parse HEAD 2> /dev/null || echo unknown)"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null | sed 's/^/GPU, driver, memory: /'
    echo "cores: $(getconf _NPROCESSORS_ONLN)"
    python3 -c 'import platform, torch, torchvision; print(f"python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}")'
}

export PYTHONPATH=$root:$site${PYTHONPATH:+:$PYTHONPATH} PATH=$site/bin:$PATH PYTHONUNBUFFERED=1
export JUPYTER_PATH=$site/share/jupyter${JUPYTER_PATH:+:$JUPYTER_PATH}
export TORCHINDUCTOR_CACHE_DIR=$root/$work/inductor # of all notebooks together
machine > "$work/machine.txt" || { say "python3 has no torch and torchvision"; exit 2; }
install || { say "install: failed"; exit 1; }
say "installed: $(find "$wheels" -type f -name '*.whl' | wc -l) wheels"
for folder in "${reports[@]}"; do mkdir -p "$folder" && cp "$work/machine.txt" "$folder"; done
while IFS= read -r line; do say "$line"; done < "$work/machine.txt"

done_mark=$work/${reports[0]#reports/}.done
if [ -e "$done_mark" ]; then say "benchmark: done by an earlier call"
elif part "benchmark" timeout 420 imaginet notebook p95_benchmark --profile "$benchmark"; then touch "$done_mark"
else status=$?
fi
part "reproduce" imaginet reproduce --profile "$profile" || status=$?
exit "$status"
