"""Fine-tune the projector of a compressed vision-language model.

deepspeed train.py --config configs/llava-1.5-7b/ft-64.yaml key=value ...      several GPUs (or CPU processes) of one machine
python train.py --config configs/tiny-llava/demo.yaml                           one process
torchrun --nproc_per_node 2 train.py --config ...                               the same under torchrun
"""

from train.cli import main

if __name__ == "__main__":
    main()
