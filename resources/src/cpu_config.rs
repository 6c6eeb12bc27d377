//! `cpu-config`: changes of what CPUID and MSRs tell the guest, as Firecracker's custom CPU templates.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A custom CPU template.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// KVM capabilities that must be there, by number; with `!` before it one is no longer required.
    #[serde(default)]
    pub kvm_capabilities: Vec<String>,
    /// Changes of CPUID.
    #[serde(default)]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Changes of MSRs.
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// Changes of one CPUID leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    /// EAX of the query.
    pub leaf: Number<u32>,
    /// ECX of the query.
    pub subleaf: Number<u32>,
    /// KVM's flags of the entry (`KVM_CPUID_FLAG_*`).
    pub flags: u32,
    /// Changes of its registers.
    pub modifiers: Vec<RegisterModifier>,
}

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Changes of one register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    /// Which one.
    pub register: Register,
    /// Which bits.
    pub bitmap: Bitmap<u32>,
}

/// Changes of one MSR.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Its index.
    pub addr: Number<u32>,
    /// Which bits.
    pub bitmap: Bitmap<u64>,
}

/// Unsigned integers of which bitmaps and numbers are made.
pub trait Bits: Copy + Into<u64> {
    /// How many bits there are.
    const WIDTH: usize;
    /// The integer `value`, if it fits.
    fn narrow(value: u64) -> Option<Self>;
}

impl Bits for u32 {
    const WIDTH: usize = 32;
    fn narrow(value: u64) -> Option<Self> {
        Self::try_from(value).ok()
    }
}

impl Bits for u64 {
    const WIDTH: usize = 64;
    fn narrow(value: u64) -> Option<Self> {
        Some(value)
    }
}

/// A number written as `0x...` or `0b...`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number<T>(pub T);

impl<'de, T: Bits> Deserialize<'de> for Number<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let value = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
            (Some(digits), _) => u64::from_str_radix(digits, 16).ok(),
            (_, Some(digits)) => u64::from_str_radix(digits, 2).ok(),
            _ => None,
        };
        value.and_then(T::narrow).map(Self).ok_or_else(|| {
            serde::de::Error::custom(format!(
                "{text:?} is not a number of {} bits written as 0x... or 0b...",
                T::WIDTH
            ))
        })
    }
}

impl<T: Bits> Serialize for Number<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0.into()))
    }
}

/// Bits to set and to clear, written from the highest on as `0b` and `0`, `1`, `x` (as it is), and `_` to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap<T> {
    /// The bits that change.
    pub filter: T,
    /// What they become.
    pub value: T,
}

impl<'de, T: Bits> Deserialize<'de> for Bitmap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = text.strip_prefix("0b").and_then(|digits| {
            let (mut filter, mut value, mut count) = (0_u64, 0_u64, 0);
            for digit in digits.chars().filter(|digit| *digit != '_') {
                let (changes, set) = match digit {
                    '0' => (1, 0),
                    '1' => (1, 1),
                    'x' => (0, 0),
                    _ => return None,
                };
                filter = filter << 1 | changes;
                value = value << 1 | set;
                count += 1;
                if count > T::WIDTH {
                    return None;
                }
            }
            Some(Self { filter: T::narrow(filter)?, value: T::narrow(value)? }).filter(|_| count > 0)
        });
        parsed.ok_or_else(|| {
            serde::de::Error::custom(format!(
                "{text:?} is not a bitmap: 0b and up to {} of 0, 1, x, with _ between",
                T::WIDTH
            ))
        })
    }
}

impl<T: Bits> fmt::Display for Bitmap<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("0b")?;
        for bit in (0..T::WIDTH).rev() {
            let is_set = |bits: T| bits.into() >> bit & 1 == 1;
            f.write_str(match (is_set(self.filter), is_set(self.value)) {
                (false, _) => "x",
                (true, false) => "0",
                (true, true) => "1",
            })?;
        }
        Ok(())
    }
}

impl<T: Bits> Serialize for Bitmap<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl CpuConfig {
    /// What is wrong with the values, as the field and why.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        let number = |text: &String| text.strip_prefix('!').unwrap_or(text).parse::<u32>().is_ok();
        match self.kvm_capabilities.iter().find(|text| !number(text)) {
            Some(text) => Err(("kvm_capabilities", format!("{text:?} is not a number, with or without !"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_read_and_survives_a_round_trip() {
        let text = r#"{ "kvm_capabilities": ["!56", "121"],
            "cpuid_modifiers": [ { "leaf": "0x1", "subleaf": "0b0", "flags": 0,
                "modifiers": [ { "register": "eax", "bitmap": "0bxxxx000000000011xx00011011110010" } ] } ],
            "msr_modifiers": [ { "addr": "0x10a", "bitmap": "0b0000_1xx1" } ] }"#;
        let config: CpuConfig = serde_json::from_str(text).unwrap();
        config.check().unwrap();
        assert_eq!(config.cpuid_modifiers[0].modifiers[0].bitmap.filter, 0x0fff_3fff);
        assert_eq!(config.cpuid_modifiers[0].modifiers[0].bitmap.value, 0x0003_06f2);
        assert_eq!(config.msr_modifiers[0].bitmap, Bitmap { filter: 0b1111_1001, value: 0b1001 });
        let again: CpuConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn what_is_no_number_or_bitmap_is_refused() {
        for bad in ["0x1_0000_0000", "0x100000000", "12", "0b2", "0x", "0b"] {
            assert!(serde_json::from_value::<Number<u32>>(bad.into()).is_err(), "{bad}");
        }
        for bad in ["", "0b", "0b___", "0b2", "xx", &format!("0b{}", "x".repeat(33))] {
            assert!(serde_json::from_value::<Bitmap<u32>>(bad.into()).is_err(), "{bad}");
        }
        let config = CpuConfig { kvm_capabilities: vec!["!x".to_owned()], ..CpuConfig::default() };
        assert!(config.check().is_err());
    }
}
