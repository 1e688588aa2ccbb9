#!/usr/bin/env bash
# Not a compiler. In the place of a C compiler and archiver for macOS it gives build scripts an empty file for every
# object and library, so that scripts/ci/lint_metal.sh can type-check the feature metal without Apple's SDK. What is
# built with it cannot run.
case " $* " in
*" -E "* | *" --version "*) echo "clang stand-in" ;;
esac
while (($#)); do
    case "$1" in
    -o) : >"$2" ;;
    *.a) : >"$1" ;;
    esac
    shift
done
