#!/usr/bin/env bash
# Unpack Debian's Lmod into a folder and print its shell's init file: as a package it excludes environment-modules.
# It needs apt and the packages lua5.3, lua-posix, lua-filesystem, lua-json, lua-term and tcl.
set -euo pipefail
folder=${1:?tests/lmod.sh FOLDER}
cd "$folder"
apt-get download -qq lmod >/dev/null 2>&1
dpkg -x lmod_*.deb .
# Its files name the places where the package would have put them
grep -rIlE '/usr/(share|lib)/lmod' usr/share/lmod | xargs sed -i -E "s#/usr/(share|lib)/lmod#$PWD/usr/\\1/lmod#g"
printf '%s\n' "$PWD"/usr/share/lmod/[0-9]*/init/bash
