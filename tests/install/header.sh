# SPDX-License-Identifier: MIT
# header.sh COMPILER FLAGS...: the public header alone, as its users may compile it.
set -e
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
case $1 in
*++*) source=$folder/header.cpp ;;
*) source=$folder/header.c ;;
esac
cat >"$source" <<'SOURCE'
#include <natten.h>
#include <natten.h>
int main(void)
{
    natten_problem problem;
    natten_problem_init(&problem, NATTEN_FORWARD, NATTEN_F32, 2);
    return !(natten_bit(NATTEN_LSE) & natten_bit(NATTEN_LSE));
}
SOURCE
"$@" -Wall -Wextra -pedantic -Werror -I"$root/include" -c "$source" -o "$folder/header.o"
echo "header as $*: fine"
