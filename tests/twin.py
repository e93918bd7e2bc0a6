"""The released networks in a few lines of PyTorch that read a state dict by its names; for comparison only."""

import numpy as np
import torch
import torch.nn.functional as F

MEAN, STD = (torch.tensor(values).reshape(1, 3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def linear(state, name, tokens):
    return F.linear(tokens, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state, name, tokens, eps=1e-6):
    return F.layer_norm(tokens, tokens.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def blocks(state, stack, tokens, heads):
    depth = len({name.split(".")[1] for name in state if name.startswith(f"{stack}.")})
    for i in range(depth):
        name = f"{stack}.{i}"
        batch, length, width = tokens.shape
        qkv = linear(state, f"{name}.attn.qkv", norm(state, f"{name}.norm1", tokens))
        query, key, value = qkv.reshape(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, length, width)
        tokens = tokens + linear(state, f"{name}.attn.proj", mixed)
        hidden = F.gelu(linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.norm2", tokens)))
        tokens = tokens + linear(state, f"{name}.mlp.fc2", hidden)
    return tokens


def embed(state, image):
    """`image` [B,3,H,W], normalised -> [B,1+L,D]: patches behind the class token, positions added."""
    weight = state["patch_embed.proj.weight"]
    tokens = F.conv2d(image, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    return torch.cat([state["cls_token"].expand(len(tokens), -1, -1), tokens], dim=1) + state["pos_embed"]


def encoder(state, image, heads, first_norm):
    """`image` [B,3,H,W], normalised -> [B,1+L,D]; timm's forward_features where `first_norm` is "norm_pre"."""
    return norm(state, "norm", blocks(state, "blocks", norm(state, first_norm, embed(state, image)), heads))


def classifier(state, image, heads):
    """Logits [B,C] of the fine-tuned release, which are those of timm's model with global_pool="avg"."""
    pooled = blocks(state, "blocks", embed(state, image), heads)[:, 1:].mean(1)
    return linear(state, "head", norm(state, "fc_norm", pooled))


def addp(state, image, token_ids, mask, heads):
    """Logits [B,L,V] of the ADDP network; `image` [B,3,H,W] in [0,1], every example with as many masked tokens."""
    features = encoder(state, (image - MEAN) / STD, heads[0], "tokenizer_norm")
    batch, length = mask.shape
    masked = mask[..., None]
    visible = linear(state, "decoder_embed", features)[:, 1:] + state["decoder_pos_embed_learned"][:, 1:]
    grid = torch.where(masked, state["mask_token"] + state["decoder_pos_mask_embed"][:, 1:], visible)
    first = (state["mask_token"] + state["decoder_pos_embed_learned"][:, :1]).expand(batch, -1, -1)
    known = state["token_emb.weight"][token_ids] + state["decoder_pos_token_embed"][:, 1:]
    known = known[~mask].reshape(batch, -1, known.shape[-1])
    tokens = blocks(state, "decoder_blocks", torch.cat([first, grid, known], dim=1), heads[1])
    hidden = F.gelu(linear(state, "mlm_layer.fc", norm(state, "decoder_norm", tokens[:, 1 : 1 + length])))
    return norm(state, "mlm_layer.ln", hidden, 1e-5) @ state["token_emb.weight"].T + state["mlm_layer.bias"]


def outputs_and_gradient(function, image, weights):
    """`function(image)` and the gradient of its sum weighted by `weights`, for `image` [B,H,W,3]; numpy in and out."""
    image = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2))).requires_grad_()
    out = function(image)
    (out * torch.from_numpy(weights)).sum().backward()
    return out.detach().numpy(), image.grad.numpy().transpose(0, 2, 3, 1)
