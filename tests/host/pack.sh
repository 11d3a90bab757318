#!/bin/sh
# SPDX-License-Identifier: MIT
# pack.sh CHECK PROBLEM...: kernels compiled once, then found in a read-only folder without a compiler;
# and what is said where they are not found.
check=$1
shift
folder=$(mktemp -d)
passed=0 failed=0

# expect STATUS WORDS VARIABLE=VALUE...: the check's status, and words of what it says.
expect() {
    status=$1 words=$2
    shift 2
    said=$(env "$@" "$check" -v -s 1 -k cuda-reference-forward -o forward $problems 2>&1)
    got=$?
    if [ $got = "$status" ] && case $said in *"$words"*) true ;; *) false ;; esac; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL with $*: status $got, not $status, or not \"$words\" in: $said"
    fi
}

problems=$*
expect 0 "1 passed, 0 failed" NATTEN_CACHE_DIR="$folder"
site=/dev/null/none:$folder
expect 0 "1 passed, 0 failed" NATTEN_CACHE_DIR=$site NATTEN_JIT=off
expect 0 "1 passed, 0 failed" NATTEN_CACHE_DIR=$site NATTEN_NVRTC=/dev/null
expect 0 "NATTEN_JIT is off" NATTEN_CACHE_DIR=/dev/null/none NATTEN_JIT=off
expect 0 "No folder of compiled kernels holds reference.cu sm_90 NA_OP=0 NA_DTYPE=0" \
    NATTEN_CACHE_DIR=/dev/null/none NATTEN_JIT=off
expect 0 "NATTEN_NVRTC names /dev/null, which is no NVRTC" \
    NATTEN_CACHE_DIR=/dev/null/none NATTEN_NVRTC=/dev/null
expect 0 "1 passed, 0 failed" NATTEN_CACHE_DIR=/dev/null/none
expect 0 "is version 13.0, but the driver takes kernels of CUDA 12 to 12" HOST_DRIVER=12040
expect 0 "it serves CUDA 11.8, and 12.0 is needed" HOST_DRIVER=11080
expect 0 "host words 0 has compute capability 7.0, and 7.5 is needed" HOST_CAPABILITY=70
expect 0 "CUDA is switched off by NATTEN_DISABLE" NATTEN_DISABLE=cuda
# A GPU newer than NVRTC; one that this NVRTC knows no more.
expect 0 "1 passed, 0 failed" HOST_CAPABILITY=130
expect 0 "did not compile reference.cu sm_80 NA_OP=0 NA_DTYPE=0 (error 5): invalid value" \
    HOST_CAPABILITY=80
rm -rf "$folder"
echo "packs of kernels: $passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
