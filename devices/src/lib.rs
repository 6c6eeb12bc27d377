//! Devices of a Pinfold microVM: bus, legacy devices, virtio.
