"""Start train.py in one or several processes, as run.sh does; `./run.sh --help` says how."""
import sys

from daisy.real_run import launch_main

if __name__ == "__main__":
    sys.exit(launch_main(__file__.replace("launch.py", "train.py")))
