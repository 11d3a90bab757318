# SPDX-License-Identifier: MIT
# Searches with libFuzzer for half a minute. The checks and the planning are built with clang for
# that; the rest comes from the release build (the sanitized build repeats random inputs with it).
set -e
cd "$(dirname "$0")/../.."
folder=build/fuzz
mkdir -p $folder/found
echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' >$folder/probe.c
if ! clang -fsanitize=fuzzer,address,undefined $folder/probe.c -o $folder/probe 2>/dev/null; then
    echo "SKIP libFuzzer: this clang has no run-time libraries for it"
    echo "fuzz: 0 passed, 0 failed, 1 skipped"
    exit 0
fi
objects=$(find build/release/CMakeFiles -name '*.o' -path '*/natten_*' \
    ! -path '*/src/core/*' ! -path '*/src/natten.c.o' ! -path '*/src/table.c.o')
clang -O1 -g -fsanitize=fuzzer,address,undefined -Iinclude -Isrc -Itests \
    tests/fuzz/fuzz_problem.c tests/problem_string.c src/natten.c src/table.c src/core/*.c \
    $objects -o $folder/fuzz_problem -lpthread -ldl -lm
$folder/fuzz_problem -max_total_time=30 -max_len=40 -artifact_prefix=$folder/found/ \
    -rss_limit_mb=0 -print_final_stats=1 $folder/found
