#!/usr/bin/env bash
# Stands in for a C compiler and archiver for macOS: writes an empty file for every object and library, so that
# scripts/ci/lint_metal.sh can type-check the feature metal without Apple's SDK. The result of such a build cannot run.
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
