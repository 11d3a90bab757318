# SPDX-License-Identifier: MIT
# Installs what the tests would like to have, where that is allowed. What is missing afterwards is
# skipped by the tests, visibly.
set -u
missing=
want=${*:-g++ clang pkg-config python3-dev python3-venv
    gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user libfuzzer}
# libFuzzer comes with the run-time libraries of clang's own version, which may not be there yet.
has_fuzzer() {
    echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' |
        clang -fsanitize=fuzzer -x c - -o /dev/null 2>/dev/null
}
for package in $want; do
    case $package in
    g++ | clang | pkg-config) command -v "$package" >/dev/null || missing="$missing $package" ;;
    gcc-aarch64-linux-gnu)
        command -v aarch64-linux-gnu-gcc >/dev/null || missing="$missing $package" ;;
    libc6-dev-arm64-cross)
        test -d /usr/aarch64-linux-gnu/include || missing="$missing $package" ;;
    qemu-user) command -v qemu-aarch64 >/dev/null || missing="$missing $package" ;;
    libfuzzer) has_fuzzer || missing="$missing $package" ;;
    python3-dev) "${PYTHON:-python3}" -c 'import os, sysconfig as s, sys
sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || missing="$missing $package" ;;
    python3-venv) "${PYTHON:-python3}" -c 'import ensurepip' 2>/dev/null || missing="$missing $package" ;;
    esac
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed, and not allowed to:$missing"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
for package in $missing; do
    if [ "$package" = libfuzzer ]; then
        package=libclang-rt-$(clang -dumpversion | cut -d. -f1)-dev
    fi
    apt-get install -qq --no-install-recommends "$package" >/dev/null ||
        echo "could not install: $package"
done
exit 0
