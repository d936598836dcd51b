# shellcheck shell=bash
# What the launch scripts share. Sourced by them.

# fail MESSAGE: the user's input is wrong.
fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

# show COMMAND...: one line that a shell would read back as this command.
show() {
    local line
    printf -v line ' %q' "$@"
    printf '%s\n' "${line:1}"
}

# become COMMAND...: turn into it, so that signals reach it; in a dry run, only show it.
become() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        show "$@"
        exit 0
    fi
    exec "$@"
}

# run_folder RECIPE JOB_ID: where the job's run lives, the same after a restart.
run_folder() {
    local name
    name=$(basename "$1" .yaml)
    printf '%s\n' "${RUN_DIR:-runs/$name/$2}"
}

# processes_here: processes on this machine, as torchrun's --nproc-per-node takes it.
processes_here() {
    if [[ -z ${NPROC_PER_NODE:-} ]] && ! command -v nvidia-smi >/dev/null; then
        fail "NPROC_PER_NODE: expected a number on a machine without GPUs, got none; set it"
    fi
    printf '%s\n' "${NPROC_PER_NODE:-gpu}"
}
