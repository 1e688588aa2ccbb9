#!/usr/bin/env python3
"""Print the licences of all packages that the program gd contains.

Usage: scripts/licenses.py TARGET

For each package from a registry: name, version, licence expression, repository, and the texts of the licence files in
the package. Packages that only run at build time, and those of other targets than TARGET, are left out. A package
without a licence expression is an error.
"""

import json
import pathlib
import subprocess
import sys


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    root = pathlib.Path(__file__).resolve().parents[1]
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", sys.argv[1]]
    metadata = json.loads(subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout)
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    pending = [id for id, package in packages.items() if package["name"] == "gd-cli"]
    found = set(pending)
    while pending:
        for dependency in nodes[pending.pop()]["deps"]:
            is_normal = any(kind["kind"] is None for kind in dependency["dep_kinds"])
            if is_normal and dependency["pkg"] not in found:
                found.add(dependency["pkg"])
                pending.append(dependency["pkg"])
    chosen = sorted((packages[id] for id in found if packages[id]["source"]), key=lambda p: (p["name"], p["version"]))
    if missing := [p["name"] for p in chosen if not p["license"] and not p["license_file"]]:
        sys.exit(f"error: no licence: {', '.join(missing)}")
    print(f"The program gd contains {len(chosen)} packages by other authors.")
    for package in chosen:
        expression = package["license"] or f"see {package['license_file']}"
        print(f"\n{'=' * 80}\n{package['name']} {package['version']}: {expression}\n{package['repository'] or ''}")
        folder = pathlib.Path(package["manifest_path"]).parent
        names = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "UNLICENSE")
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name.upper().startswith(names):
                print(f"\n--- {path.name}\n{path.read_text(errors='replace').strip()}")


main()
