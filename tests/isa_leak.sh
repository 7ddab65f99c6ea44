#!/bin/sh
# Fails when libheed holds an instruction beyond the baseline where any CPU may reach it: in code that is
# not a kernel, or in an inline function of a kernel's object that the linker may keep for everybody: one
# whose name does not say for which instruction set it is. Planning is for any device, on any machine.
# usage: isa_leak.sh libheed.a
set -eu
library=$1
objdump --disassemble --demangle --no-show-raw-insn "$library" | awk '
  # "avx2.cpp.o:     file format elf64-x86-64"
  /file format/ { object = $1; isa = object; sub(/\.cpp\.o:.*/, "", isa) }
  # "0000000000000000 <heed::cpu::exp2<heed::cpu::Avx2>(...)>:"
  /^[0-9a-f]+ <.*>:$/ { name = substr($0, index($0, "<")); own = index(name, "cpu::" isa "::") || index(name, "cpu_" isa "_rows"); next }
  # VEX and EVEX mnemonics start with v; baseline ones that do are verr, verw. AMX has tiles.
  /^ +[0-9a-f]+:\t(v|tile|tdp|[ls][dt]*tilecfg)/ && !/\tver[rw]/ {
    wide++
    if (object !~ /avx|amx/ || !own || name ~ /::bytes\(|::carve\(|Kernel\(|::rows</) { print object " " name " " $0; bad++ }
    if (bad > 10) exit 1
  }
  END {
    if (wide == 0) { print "no wide instruction at all: nothing was checked"; exit 1 }
    exit bad > 0
  }'
echo "wide instructions stand in kernels only"
