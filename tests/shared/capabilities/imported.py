"""Changes of every kind that other libraries' files hold, as if read from one."""


def change(kind: str, scale: float = 0.5, **shapes: list[int]) -> dict:
    size = 0
    for shape in shapes.values():
        count = 1
        for extent in shape:
            count *= extent
        size += count
    return {"kind": kind, "scale": scale, "shapes": shapes, "trains": size}


VIT = {
    "model/blocks/0/attn/qkv": change("low_rank", down=[3, 24], up=[3, 72]),
    "model/blocks/1/mlp/fc1": change("hadamard", w1_a=[96, 2], w1_b=[2, 24], w2_a=[96, 2], w2_b=[2, 24]),
    "model/blocks/2/mlp/fc2": change("kronecker", w1=[4, 8], w2_a=[6, 2], w2_b=[2, 12]),
    "model/blocks/3/mlp/fc2:bias": change("replaced", 1.0, value=[24]),
}
CONVOLUTIONS = {
    "body/0": change("tucker", down=[2, 3], mid=[3, 2, 3, 3], up=[3, 8]),
    "body/2": change(
        "hadamard", w1_a=[2, 12], w1_b=[2, 2], t1=[2, 2, 3, 3], w2_a=[2, 12], w2_b=[2, 2], t2=[2, 2, 3, 3]
    ),
    "body/5": change("kronecker", w1=[2, 3], w2_a=[2, 3], w2_b=[2, 4], t2=[2, 2, 3, 3]),
}
HOSTS = {"vit": {"changes": VIT}, "convolutions": {"changes": CONVOLUTIONS}}
