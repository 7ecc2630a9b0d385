//! The shape of the file. What a value may be is [`super::rules`]' business.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor, value::MapAccessDeserializer},
};
use toml::Spanned;

use super::{
    DrainEnd, FlipMode,
    health::RawHealth,
    release::{
        canary::RawCanary,
        gates::RawGate,
        hooks::RawHook,
        rules::{RawApproval, RawBake, RawStandby},
        tables::{RawParity, RawWarm},
    },
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Raw {
    pub(super) gateway: Option<Spanned<RawGateway>>,
    #[serde(default)]
    pub(super) service: BTreeMap<Spanned<String>, RawService>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawGateway {
    pub(super) interfaces: Option<Spanned<Vec<String>>>,
    pub(super) xdp: Option<Spanned<String>>,
    pub(super) max_flows: Option<Spanned<i64>>,
    pub(super) max_services: Option<Spanned<i64>>,
    pub(super) socket: Option<Spanned<PathBuf>>,
    pub(super) state_dir: Option<Spanned<PathBuf>>,
    pub(super) bpffs: Option<Spanned<PathBuf>>,
    pub(super) metrics: Option<Spanned<String>>,
    pub(super) journal_max: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawService {
    pub(super) listen: Option<Spanned<Vec<Spanned<String>>>>,
    pub(super) forward: Option<Spanned<String>>,
    pub(super) announce: Option<bool>,
    pub(super) on_flip: Option<FlipMode>,
    pub(super) drain: Option<Spanned<String>>,
    pub(super) drain_end: Option<DrainEnd>,
    pub(super) reset_over: Option<Spanned<String>>,
    pub(super) udp_idle: Option<Spanned<String>>,
    pub(super) blue: Option<RawColour>,
    pub(super) green: Option<RawColour>,
    pub(super) health: Option<Spanned<RawHealth>>,
    pub(super) parity: Option<Spanned<RawParity>>,
    pub(super) warm: Option<Spanned<RawWarm>>,
    pub(super) gate: Option<Spanned<Vec<Spanned<RawGate>>>>,
    pub(super) approval: Option<RawApproval>,
    pub(super) canary: Option<Spanned<Vec<Spanned<RawCanary>>>>,
    pub(super) bake: Option<RawBake>,
    pub(super) standby: Option<RawStandby>,
    pub(super) hook: Option<Spanned<Vec<Spanned<RawHook>>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawColour {
    pub(super) version: Option<String>,
    pub(super) backends: Option<Spanned<Vec<Spanned<RawBackend>>>>,
    pub(super) preview: Option<Spanned<Vec<Spanned<String>>>>,
}

#[derive(Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub(super) struct RawBackend {
    pub(super) address: String,
    pub(super) weight: Option<i64>,
}

impl<'de> Deserialize<'de> for RawBackend {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrTable;

        impl<'de> Visitor<'de> for TextOrTable {
            type Value = RawBackend;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"10.0.1.10:9000\" or { address = \"10.0.1.10:9000\", weight = 2 }")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<RawBackend, E> {
                Ok(RawBackend {
                    address: text.to_owned(),
                    weight: None,
                })
            }

            fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<RawBackend, M::Error> {
                RawBackend::deserialize(MapAccessDeserializer::new(map))
            }
        }
        deserializer.deserialize_any(TextOrTable)
    }
}
