"""
Puts the common test suites of the installed transformers into this environment, for the tests beside this file.

They are part of its source distribution, which pip downloads. Run it with the environment's own Python.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath


def main():
    folder = Path(sys.prefix) / "transformers-tests"
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*download, "--dest", scratch, f"transformers=={version('transformers')}"], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        folder.mkdir(exist_ok=True)
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                parts = PurePosixPath(member.name).parts
                if len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                    (folder / parts[2]).write_bytes(tar.extractfile(member).read())
    (folder / "__init__.py").touch()
    print(folder)


if __name__ == "__main__":
    main()
