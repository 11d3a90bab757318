# SPDX-License-Identifier: MIT
# Writes the device texts as C arrays:
#   cmake -DROOT=folder -DFILES=a;b -DOUTPUT=file.c -P embed.cmake
# FILES are relative to ROOT; a file is found at run time by its name without the leading "src/" or
# "include/".
set(arrays "")
set(table "")
set(digests "")
set(count 0)
foreach(file IN LISTS FILES)
  file(READ "${ROOT}/${file}" bytes HEX)
  file(SHA256 "${ROOT}/${file}" digest)
  string(REGEX REPLACE "(..)" "0x\\1," bytes "${bytes}")
  string(REGEX REPLACE "(................................................................................)"
         "\\1\n" bytes "${bytes}")
  string(REGEX REPLACE "^(src|include)/" "" name "${file}")
  string(APPEND arrays "static const char text_${count}[] = {\n${bytes}0};\n")
  string(APPEND table "    {\"${name}\", text_${count}},\n")
  string(APPEND digests "${name} ${digest}\n")
  math(EXPR count "${count} + 1")
endforeach()
string(SHA256 digest "${digests}")
string(SUBSTRING "${digest}" 0 32 digest)
file(WRITE "${OUTPUT}" "#include \"cuda/source.h\"\n${arrays}"
     "const na_source na_sources[] = {\n${table}};\n"
     "const int na_source_count = ${count};\n"
     "const char na_source_digest[] = \"${digest}\";\n")
