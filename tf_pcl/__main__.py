"""The command line as a module: python -m tf_pcl VERB [flags]."""

from tf_pcl.cli import main

if __name__ == "__main__":
    main()
