r"""Transfer a denoiser of latents, such as an ImageNet DiT, to a labelled data set that it was never trained on.

    python examples/latent_transfer.py --model_name_or_path facebook/DiT-XL-2-256 --dataset_name uoft-cs/cifar10 \
        --num_views 10 --random_flip --random_crop 32 --output_dir runs/dit_cifar10

Every image, and changed copies of it (`--num_views`), are resized to the size that the network was trained on and
encoded once; then the VAE is put away, and the denoiser reads the latents from the disk. Layer and noise level are
chosen on a part of the training images, the best pair is probed on all of them, and tested once. `--finetune` then
trains the network itself, with options such as '{num_train_epochs: 5}'. What all this will take is said before it
begins; what was interrupted goes on where it stopped.
"""
