"""MaPeT: attention masks, what a query depends on, the order of targets, and the visual tokens."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest
import torch
from transformers import BeitConfig, BeitModel, CLIPVisionConfig, CLIPVisionModel

from synthgen.config import Choice
from synthgen.errors import ConfigError, MissingArtifact
from synthgen.loader import Batch
from synthgen.methods import METHODS
from synthgen.methods.mapet import attention_mask, cross_attend, normalised_for
from synthgen.models.codebook import Codebook, kmeans, nearest
from synthgen.models.draws import uniform
from synthgen.models.layers import patchify, take
from synthgen.models.vit import EncoderConfig, VisionTransformer, save_encoder

CONFIG = EncoderConfig(image_size=16, patch_size=4, dim=32, depth=2, num_heads=4)
N, GIVEN, TARGETS = 16, 4, 12
FORMS = ["mapet", "pim", "mim"]


def build(config=CONFIG, **options):
    torch.manual_seed(0)
    return METHODS.build(Choice("mapet", {"num_tokens": 24, **options}), encoder=VisionTransformer(config))


def make_batch(count=4, masks=None, first_seed=0, content=0):
    masks = torch.zeros(count, 0, 16, 16, dtype=torch.bool) if masks is None else masks
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(content))
    nothing = ((),) * count
    texts = ("",) * count
    return Batch(
        images, masks, masks.flatten(2).any(2), torch.arange(count) + first_seed, texts, texts, nothing, (None,) * count
    )


def drawn(method, batch):
    patches = patchify(batch.images, 4)
    return patches, *method.split(batch.seeds, torch.zeros(len(batch), N), 0.0)


# -- attention masks


def allowed(form, row, column, c):
    """The paper's table: whether ``row`` attends to ``column``. Each is (kind, rank), the kinds X, M and g."""
    (asking, i), (asked, j) = row, column
    if asked == "M" and form == "pim":
        return False
    if form == "mim" or asking == "M" or (asking == "X" and i < c):
        return asked == "M" or j < c
    if asking == "X":
        return (j < c or j <= i) if asked == "X" else j > i
    return (j < c or j < i) if asked == "X" else j >= i


@pytest.mark.parametrize("form", FORMS)
def test_the_table_is_the_papers(form):
    c, n = 3, 8
    columns = [("X", rank) for rank in range(n)] + [("M", rank) for rank in range(c, n)]
    rows = columns + [("g", rank) for rank in range(c, n)]
    expected = [[allowed(form, row, column, c) for column in columns] for row in rows]
    assert attention_mask(form, c, n).tolist() == expected


def test_every_row_attends_to_each_position_once():
    c, n = 5, 17
    seen = attention_mask("mapet", c, n)
    assert (seen.sum(1) == n).all()
    content, masks = seen[:, :n], seen[:, n:]
    assert content[:, :c].all()
    assert (content[:, c:] != masks).all()  # of a target its content or its M, never both or neither


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_both_streams_are_those_of_the_table_in_the_order_of_the_grid(form):
    """Written out for one image: nothing sorted, all tokens kept, every head's softmax with forbidden pairs at -1e30.

    Keys and values are the content's, and M moves on from block to block.
    """
    method = build(form=form)
    patches, given, targets = drawn(method, make_batch(2))
    said = method.read(patches, given, targets)
    for image in range(2):
        ranks = {0: 0} | {p + 1: r for r, p in enumerate([*given[image].tolist(), *targets[image].tolist()], 1)}
        places = sorted(targets[image].tolist())
        masks = method.mask_token[0] + method.encoder.pos_embed[0, 1:][places]
        content = torch.cat([method.encoder.embed(patches[image : image + 1])[0], masks])
        query = masks
        columns = [("X", ranks[t]) for t in range(N + 1)] + [("M", ranks[p + 1]) for p in places]
        rows = columns + [("g", ranks[p + 1]) for p in places]
        bias = torch.tensor([[0.0 if allowed(form, r, c, 1 + GIVEN) else -1e30 for c in columns] for r in rows])
        for block in method.encoder.blocks:
            both = torch.cat([content, query])
            q, k, v = block.attn.qkv(block.norm1(both)).chunk(3, dim=1)
            heads = []
            for h in range(4):
                w = slice(8 * h, 8 * h + 8)
                scores = q[:, w] @ k[: len(content), w].T / math.sqrt(8) + bias
                heads.append(scores.softmax(1) @ v[: len(content), w])
            both = both + block.attn.proj(torch.cat(heads, dim=1))
            both = both + block.mlp(block.norm2(both)[None])[0]
            content, query = both[: len(content)], both[len(content) :]
        expected = method.encoder.norm(query)[[places.index(p) for p in targets[image].tolist()]]
        assert torch.allclose(said[image], expected, atol=1e-5)


@torch.no_grad()
def test_mim_is_the_plain_encoder_on_mask_tokens():
    method = build(form="mim")
    patches, given, targets = drawn(method, make_batch())
    masks = method.mask_token + method.encoder.pos_embed[0, 1:][targets]
    x = torch.cat([method.encoder.embed(take(patches, given), given), masks], dim=1)
    for block in method.encoder.blocks:
        x = block(x)
    assert torch.allclose(method.read(patches, given, targets), method.encoder.norm(x)[:, -TARGETS:], atol=1e-5)


@torch.no_grad()
def test_cross_attention_to_all_tokens_is_the_block():
    block, x = build().encoder.blocks[0], torch.randn(2, 7, 32)
    assert torch.allclose(cross_attend(block, x, x, torch.ones(7, 7, dtype=torch.bool)), block(x), atol=1e-6)


def test_keys_of_no_token_are_left_out():
    lengths = {form: len(build(form=form).used) for form in FORMS}
    assert lengths == {"mapet": 1 + N + TARGETS, "pim": 1 + N, "mim": 1 + GIVEN + TARGETS}


# -- what a query depends on


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_query_depends_on_neither_its_patch_nor_later_ones(form):
    method = build(form=form)
    patches, given, targets = drawn(method, make_batch(1))
    said = method.read(patches, given, targets)
    for rank, place in enumerate(targets[0].tolist()):
        changed = patches.clone()
        changed[0, place] += 1.0
        differs = (method.read(changed, given, targets) != said).any(2)[0]
        assert not differs[: rank + 1].any()
        assert differs[rank + 1 :].all() == (form != "mim" or rank == TARGETS - 1)  # those after it do, but for mim
    patches[0, given[0, 0]] += 1.0
    assert (method.read(patches, given, targets) != said).any(2).all()


@torch.no_grad()
def test_later_positions_matter_except_for_pim():
    """Another place for the last target changes what is said of the first."""
    for form, known in (("mapet", True), ("pim", False), ("mim", True)):
        method = build(form=form)
        patches, given, targets = drawn(method, make_batch(1))
        said = method.read(patches, given, targets)
        method.encoder.pos_embed[0, 1 + targets[0, -1]] += 1.0
        assert torch.equal(method.read(patches, given, targets)[:, 0], said[:, 0]) != known


# -- the order of targets


def test_orders_are_uniform_and_differ():
    method = build()
    given, targets = method.split(torch.arange(3000), torch.zeros(3000, N), 0.0)
    assert torch.equal(torch.cat([given, targets], 1).sort(1).values, torch.arange(N).expand(3000, -1))
    often = torch.stack([targets[:, rank].bincount(minlength=N) for rank in (0, 5, 11)]) / 3000
    assert (often - 1 / N).abs().max() < 0.02
    assert len(targets.unique(dim=0)) == 3000


def test_guidance_chooses_targets_and_their_order_stays_uniform():
    method = build(foreground_share=0.5)
    foreground = torch.zeros(2000, N)
    foreground[:, :6] = 1.0
    shares = []
    for progress in (0.0, 0.5, 1.0):
        _, targets = method.split(torch.arange(2000), foreground, progress)
        shares.append(float((targets < 6).float().sum() / (6 * 2000)))
        assert ((targets < 6).float().mean(0) - (targets < 6).float().mean()).abs().max() < 0.05  # at every rank
    assert shares[0] == pytest.approx(0.75, abs=0.02)
    assert shares[0] < shares[1] < shares[2] == 1.0


def test_guidance_without_masks_is_the_plain_form_and_with_them_is_recorded():
    batch = make_batch()
    assert build(foreground_share=1.0)(batch, 1.0).loss == build()(batch, 1.0).loss
    masks = torch.zeros(4, 1, 16, 16, dtype=torch.bool)
    masks[:, :, :8, :8] = True
    output = build(foreground_share=1.0)(make_batch(masks=masks), 1.0)
    assert output.metrics["foreground_hidden"] == 1.0


# -- tokens


def test_the_loss_is_its_formula():
    method, batch = build(), make_batch()
    output = method(batch, 0.0)
    patches, given, targets = drawn(method, batch)
    with torch.no_grad():
        scores = method.head(method.read(patches, given, targets)).double().log_softmax(2)
    book, total, tokens = method.codebook, 0.0, []
    for image in range(4):
        for k, place in enumerate(targets[image].tolist()):
            point = (patches[image, place] - book.mean) @ book.directions
            token = min(range(24), key=lambda number: float(((point - book.codes[number]) ** 2).sum()))
            tokens.append(token)
            total -= float(scores[image, k, token])
    assert output.loss.item() == pytest.approx(total / len(tokens), rel=1e-5)
    shares = [tokens.count(token) / len(tokens) for token in set(tokens)]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert output.metrics["perplexity"].item() == pytest.approx(expected, rel=1e-4)
    assert len(shares) > 6


def test_pixels_are_whitened_and_only_the_first_batch_decides():
    method, batch = build(), make_batch(64)
    batch = dataclasses.replace(batch, images=0.5 * batch.images + 3.0)
    method(batch, 0.0)
    book = method.codebook
    patches = patchify(batch.images, 4)
    points = ((patches - book.mean) @ book.directions).flatten(0, 1)
    assert points.shape == (64 * N, 8)  # fewer than 64 for each of the 24 codes: all were taken
    assert torch.allclose(points.mean(0), torch.zeros(8), atol=1e-3)
    assert torch.allclose(points.T @ points / len(points), torch.eye(8), atol=0.02)
    before = {name: tensor.clone() for name, tensor in book.state_dict().items()}
    method(make_batch(content=1), 0.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in book.state_dict().items())


def test_a_resumed_training_keeps_its_tokens():
    method, again, fresh = build(), build(), build()
    method(make_batch(), 0.0)
    again.load_state_dict(method.state_dict())  # what checkpoints hold
    other = make_batch(content=1)
    assert again(other, 0.0).loss == method(other, 0.0).loss
    assert torch.equal(again.codebook.codes, method.codebook.codes)
    fresh(other, 0.0)
    assert not torch.equal(fresh.codebook.codes, method.codebook.codes)  # what that batch, seen first, would have made


def test_tokens_do_not_depend_on_torchs_seed():
    method = build()
    copy = pickle.loads(pickle.dumps(method))
    method(make_batch(), 0.0)
    torch.manual_seed(123)
    copy(make_batch(), 0.0)
    assert torch.equal(copy.codebook.codes, method.codebook.codes)


def test_kmeans_takes_a_sample_of_large_batches():
    method, sizes = build(num_tokens=2), []
    fit = method.codebook.fit
    method.codebook.fit = lambda vectors, lot: (sizes.append((len(vectors), len(lot))), fit(vectors, lot))
    method(make_batch(32), 0.0)
    assert sizes == [(64 * 2, 64 * 2)]


def test_no_code_is_wasted_on_equal_points():
    points = torch.cat([torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(900, 5)])
    lot = uniform(torch.tensor([0]), len(points))[0]
    ids, distances = nearest(points, kmeans(points, lot, 16))
    assert len(ids.unique()) == 16
    assert len(ids[60:].unique()) == 1
    assert torch.equal(ids, torch.cdist(points, kmeans(points, lot, 16)).argmin(1))
    assert distances.sum() < 0.6 * nearest(points, points[:16])[1].sum()  # than codes drawn and left as they are


def test_fewer_patches_than_codes_and_equal_ones_will_do():
    for vectors in (torch.randn(5, 12), torch.ones(40, 12)):
        book = Codebook(12, 32, whiten=True)
        book.fit(vectors, torch.rand(len(vectors)))
        assert all(tensor.isfinite().all() for tensor in book.buffers())
        assert len(book(vectors[None]).unique()) == len(vectors.unique(dim=0))


def test_tokens_may_come_from_a_pretrained_encoder(tmp_path):
    torch.manual_seed(1)
    teacher = VisionTransformer(dataclasses.replace(CONFIG, dim=16, depth=1, num_heads=2))
    save_encoder(teacher, tmp_path)
    method, batch = build(tokenizer=str(tmp_path)), make_batch()
    method(batch, 0.0).loss.backward()
    with torch.no_grad():
        features = teacher(batch.images)[:, 1:]
    ids = torch.cdist(features, method.codebook.codes.expand(4, -1, -1)).argmin(2)
    assert torch.equal(method.tokens(batch, patchify(batch.images, 4)), ids)
    assert all(not p.requires_grad and p.grad is None for p in method.tokenizer.parameters())
    with pytest.raises(ConfigError, match="sees 16 pixels in patches of 4, and the encoder 16 in patches of 2"):
        build(dataclasses.replace(CONFIG, patch_size=2), tokenizer=str(tmp_path))
    with pytest.raises(MissingArtifact, match="no encoder in"):
        build(tokenizer=str(tmp_path / "none"))


def test_tokens_may_come_from_clip(tmp_path):
    """A vision tower of another size and normalisation, which is set to as many patches."""
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    clip = CLIPVisionModel(CLIPVisionConfig(**shape, image_size=32, patch_size=16)).eval()
    clip.save_pretrained(tmp_path)
    method, batch = build(tokenizer=str(tmp_path)), make_batch()
    assert method.tokenizer.config.image_size == 64  # 4 x 4 patches, as ours
    method(batch, 0.0).loss.backward()
    with torch.no_grad():
        pixels = normalised_for(method.tokenizer.config, CONFIG, batch.images)
        features = clip(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    ids = torch.cdist(features, method.codebook.codes.expand(4, -1, -1)).argmin(2)
    assert torch.equal(method.tokens(batch, patchify(batch.images, 4)), ids)
    assert all(not p.requires_grad and p.grad is None for p in method.tokenizer.parameters())


def test_a_tokenizer_with_drop_path_is_deterministic(tmp_path):
    """Training mode is for what learns; tokens that were a draw would differ from process to process."""
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    beit = BeitModel(BeitConfig(**shape, image_size=16, patch_size=4, drop_path_rate=0.9, layer_scale_init_value=1.0))
    for weight in beit.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.1)
    beit.save_pretrained(tmp_path)
    method, batch = build(tokenizer=str(tmp_path)), make_batch(8)
    assert method.train() is method
    assert method.training
    assert method.head.training
    assert not any(part.training for part in method.tokenizer.modules())
    patches = patchify(batch.images, 4)
    first = method.tokens(batch, patches)
    assert all(torch.equal(method.tokens(batch, patches), first) for _ in range(3))
    assert len(first.unique()) > 8
    assert not method.eval().training
    assert build().train().training  # without a tokenizer


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio 1.0"),
        ({"form": "xlnet"}, "form"),
        ({"num_tokens": 1}, "num_tokens must be at least 2"),
        ({"foreground_share": 1.5}, "at least 0 and at most 1"),
    ],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(ConfigError, match=error):
        build(**options)
