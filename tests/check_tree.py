"""Is the tree in sync? Exports, cleans and rebuilds the README in a copy, and lists what would change.

    python tests/check_tree.py
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def changes(root=ROOT):
    "Paths that nbdev_export, nbdev_clean or the README script would change, with their diffs."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        tracked = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root,
                                 capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, tracked):
            if (root / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, copy / name)
        git = lambda *args: subprocess.run(["git", *args], cwd=copy, capture_output=True, text=True, check=True).stdout
        git("init", "-q"); git("add", "-A")
        git("-c", "user.name=check", "-c", "user.email=check@localhost", "commit", "-qm", "as it is")
        for command in ([BIN / "nbdev_export"], [BIN / "nbdev_clean"], [sys.executable, "tests/make_readme.py"]):
            subprocess.run(command, cwd=copy, check=True, stdout=subprocess.DEVNULL)
        git("add", "-A")
        return git("diff", "--cached", "--stat"), git("diff", "--cached")


if __name__ == "__main__":
    stat, diff = changes()
    if stat:
        print(f"not in sync; run nbdev_export, nbdev_clean and python tests/make_readme.py, and commit:\n{stat}\n{diff[:4000]}")
        sys.exit(1)
    print("in sync: nbdev_export, nbdev_clean and tests/make_readme.py change nothing")
