"""The networks of the published 4-bit tables by name, for small images and, as NAME_imagenet, for large ones; and `gpt`.

    build("resnet20", num_classes=10)                    # CIFAR: 3 channels, 32x32
    build("digits_cnn", num_classes=10, in_channels=1, image_size=8)
    build("gpt?width=128&depth=2&heads=2&context=64", num_classes=512)      # a vocabulary of 512 tokens

They are ordinary full-precision PyTorch modules made of layers of torch, and know nothing of quantization: a recipe turns
them into 4-bit networks afterwards. Modules are registered in the order of the data flow, so the first convolution is the
first layer and the classifier the last. All for images but AlexNet end in a global average pool and accept images of any
size, from 8x8 on (those for ImageNet from 32x32). To add a network, register one function (see `_base`).
"""

from fourbit.models._alexnet import AlexNet as AlexNet
from fourbit.models._base import MIN_IMAGE_SIZE as MIN_IMAGE_SIZE
from fourbit.models._base import Kind as Kind
from fourbit.models._base import build as build
from fourbit.models._base import context_of as context_of
from fourbit.models._base import is_recurrent as is_recurrent
from fourbit.models._base import kind_of as kind_of
from fourbit.models._base import min_image_size as min_image_size
from fourbit.models._base import names as names
from fourbit.models._base import register as register
from fourbit.models._densenet import DenseNet as DenseNet
from fourbit.models._digits import DigitsCnn as DigitsCnn
from fourbit.models._googlenet import GoogLeNet as GoogLeNet
from fourbit.models._gpt import Gpt as Gpt
from fourbit.models._hf import build_hf_untouched as build_hf_untouched
from fourbit.models._language import LstmLanguageModel as LstmLanguageModel
from fourbit.models._mobilenet import MobileNetV2 as MobileNetV2
from fourbit.models._own import is_own as is_own
from fourbit.models._own import own_digest as own_digest
from fourbit.models._resnet import ResNet as ResNet
from fourbit.models._speech import AcousticModel as AcousticModel
from fourbit.models._transformer import Transformer as Transformer
from fourbit.models._vgg import Vgg as Vgg
