# Sourced by the scripts that run programs on a GPU machine: `. scripts/hardware/gpu_programs.sh DIR OUT PROGRAM..`
# checks that DIR has the programs and that there is a GPU, whose name goes to OUT/gpu, and puts the CUDA libraries that
# the loader does not find into LD_LIBRARY_PATH. Ends the script with status 2 where something is missing.
programs=()
for program in "${@:3}"; do
    programs+=("$1/$program")
    if [[ ! -x "$1/$program" ]]; then
        echo "error: $1/$program is missing: $0 --build $1 makes it" >&2
        exit 2
    fi
done
mkdir -p "$2"
if ! nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >"$2/gpu" 2>&1; then
    echo "error: nvidia-smi finds no GPU: $(cat "$2/gpu")" >&2
    exit 2
fi
cat "$2/gpu"

missing() { ldd "${programs[@]}" | sed -n 's/^\s*\(lib[^ ]*\) => not found.*/\1/p' | sort -u; }
for library in $(missing); do
    places=("${CUDA_HOME:-/usr/local/cuda}/lib64")
    while IFS= read -r place; do places+=("$place"); done < <(
        python3 -c 'import glob, sys
for root in sys.path:
    print(*glob.glob(root + "/nvidia/*/lib"), sep="\n")' 2>/dev/null
    )
    for place in "${places[@]}"; do
        if [[ -e "$place/$library" ]]; then
            export LD_LIBRARY_PATH="$place${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
            break
        fi
    done
done
if [[ -n "$(missing)" ]]; then
    echo "error: libraries are missing:" $(missing) >&2
    exit 2
fi
