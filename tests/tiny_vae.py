"""Wan's autoencoder in the shape of the published one, with few channels and every weight random."""

import torch

from kinema import seeds


def autoencoder():
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    network = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2)
    with torch.no_grad():
        for name, p in network.named_parameters():
            scale = 0.1 if p.ndim < 2 or name.endswith("gamma") else p[0].numel() ** -0.5
            p.copy_(float(name.endswith("gamma")) + scale * seeds.keys(0, name, [0]).normal(*p.shape)[0])
    return network.eval().requires_grad_(False)
