//! The uncompressed ELF kernel inside a bzImage (Linux, Documentation/arch/x86/boot.rst).

/// What is wrong with a bzImage.
#[derive(Debug, thiserror::Error)]
pub enum BzImageError {
    /// The boot header is missing or points outside the file.
    #[error("the file is no bzImage, or it is cut short")]
    Header,
    /// The payload is compressed by something else than LZ4.
    #[error("the kernel inside the bzImage is not compressed by LZ4")]
    Method,
    /// A block does not decompress.
    #[error("the kernel inside the bzImage is damaged")]
    Damaged(#[source] lz4_flex::block::DecompressError),
}

const MAGIC_OFFSET: usize = 0x202;
const SETUP_SECTORS_OFFSET: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// The legacy frame of the LZ4 tools: this, then blocks of length and data.
const LZ4_LEGACY: u32 = 0x184c_2102;
/// Every block but the last unpacks to this size.
const BLOCK: usize = 8 << 20;

/// Returns the ELF file inside `image`.
pub fn vmlinux(image: &[u8]) -> Result<Vec<u8>, BzImageError> {
    if image.get(MAGIC_OFFSET..MAGIC_OFFSET + 4) != Some(b"HdrS") {
        return Err(BzImageError::Header);
    }
    let sectors = match *image.get(SETUP_SECTORS_OFFSET).ok_or(BzImageError::Header)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + number(image, PAYLOAD_OFFSET)?;
    let length = number(image, PAYLOAD_LENGTH)?;
    // The last four bytes are the unpacked size.
    let end = start.checked_add(length).and_then(|end| end.checked_sub(4)).ok_or(BzImageError::Header)?;
    let size = number(image, end)?;
    let mut payload = image.get(start..end).ok_or(BzImageError::Header)?;
    if number(payload, 0)? != LZ4_LEGACY as usize {
        return Err(BzImageError::Method);
    }
    payload = &payload[4..];
    let mut kernel = Vec::with_capacity(size);
    while !payload.is_empty() {
        let packed = number(payload, 0)?;
        let block = payload.get(4..4 + packed).ok_or(BzImageError::Header)?;
        kernel.extend(lz4_flex::block::decompress(block, BLOCK).map_err(BzImageError::Damaged)?);
        payload = &payload[4 + packed..];
    }
    if kernel.len() == size && kernel.starts_with(b"\x7fELF") {
        Ok(kernel)
    } else {
        Err(BzImageError::Header)
    }
}

/// The little-endian 32-bit number at `offset`.
fn number(bytes: &[u8], offset: usize) -> Result<usize, BzImageError> {
    let raw =
        bytes.get(offset..offset + 4).and_then(|raw| raw.try_into().ok()).ok_or(BzImageError::Header)?;
    usize::try_from(u32::from_le_bytes(raw)).map_err(|_| BzImageError::Header)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage with one setup sector whose payload is `kernel` in the legacy LZ4 frame.
    fn image(kernel: &[u8]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY.to_le_bytes().to_vec();
        for block in kernel.chunks(BLOCK) {
            let packed = lz4_flex::block::compress(block);
            payload.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
            payload.extend(packed);
        }
        payload.extend(u32::try_from(kernel.len()).unwrap().to_le_bytes());
        let mut image = vec![0; 1024];
        image[SETUP_SECTORS_OFFSET] = 1;
        image[MAGIC_OFFSET..MAGIC_OFFSET + 4].copy_from_slice(b"HdrS");
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4]
            .copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend(payload);
        image
    }

    #[test]
    fn the_kernel_comes_out_whole() {
        let mut kernel = b"\x7fELF".to_vec();
        kernel.resize(BLOCK + 12345, 7);
        assert_eq!(vmlinux(&image(&kernel)).unwrap(), kernel);
    }

    #[test]
    fn other_files_are_refused() {
        assert!(matches!(vmlinux(b"#!/bin/sh"), Err(BzImageError::Header)));
        let good = image(b"\x7fELF and so on");
        assert!(matches!(vmlinux(&good[..good.len() - 6]), Err(BzImageError::Header)));
        let mut other = good.clone();
        other[1024] = 0x1f;
        assert!(matches!(vmlinux(&other), Err(BzImageError::Method)));
    }
}
