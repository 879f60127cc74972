"""Sentences that tell the text encoder how good a clip looks, by its aesthetic score."""

LOW_SCORE = 4.25  # scores up to this one get a sentence about low quality
HIGH_SCORE = 5.75  # scores from this one on get a sentence about high quality

LOW_IMAGE = (
    "this picture has low aesthetic quality.",
    "the photo looks plain and poorly composed.",
    "an image of low aesthetic value.",
    "the picture is unattractive to look at.",
    "the composition and the light of this photo are poor.",
    "this is a weak photograph with little visual appeal.",
    "the image is rated low for its aesthetics.",
    "a careless snapshot without visual appeal.",
    "the colors and the framing of the picture are dull.",
    "a photo of poor aesthetic quality.",
    "visually, this image is below average.",
    "the picture was taken without care for beauty.",
)

HIGH_IMAGE = (
    "this picture has high aesthetic quality.",
    "the photo looks beautiful and well composed.",
    "an image of high aesthetic value.",
    "the picture is a pleasure to look at.",
    "the composition and the light of this photo are excellent.",
    "this is a strong photograph with great visual appeal.",
    "the image is rated high for its aesthetics.",
    "a careful photograph full of visual appeal.",
    "the colors and the framing of the picture are superb.",
    "a photo of outstanding aesthetic quality.",
    "visually, this image is far above average.",
    "the picture was taken with an eye for beauty.",
)

LOW_VIDEO = (
    "this video has low aesthetic quality.",
    "the footage looks plain and poorly composed.",
    "a video of low aesthetic value.",
    "the clip is unattractive to watch.",
    "the camera work and the light of this video are poor.",
    "this is a weak recording with little visual appeal.",
    "the video is rated low for its aesthetics.",
    "careless footage without visual appeal.",
    "the colors and the framing of the clip are dull.",
    "a clip of poor aesthetic quality.",
    "visually, this video is below average.",
    "the scene was filmed without care for beauty.",
)

HIGH_VIDEO = (
    "this video has high aesthetic quality.",
    "the footage looks beautiful and well composed.",
    "a video of high aesthetic value.",
    "the clip is a pleasure to watch.",
    "the camera work and the light of this video are excellent.",
    "this is a strong recording with great visual appeal.",
    "the video is rated high for its aesthetics.",
    "careful footage full of visual appeal.",
    "the colors and the framing of the clip are superb.",
    "a clip of outstanding aesthetic quality.",
    "visually, this video is far above average.",
    "the scene was filmed with an eye for beauty.",
)


def aesthetic_sentences(score: float | None, is_image: bool) -> tuple[str, ...]:
    """The sentences that suit an aesthetic score; none for a middling or an absent score.

    Every sentence is already in the form that `clean_caption` leaves unchanged.
    """
    if score is None or LOW_SCORE < score < HIGH_SCORE:
        return ()
    if score <= LOW_SCORE:
        return LOW_IMAGE if is_image else LOW_VIDEO
    return HIGH_IMAGE if is_image else HIGH_VIDEO
