-- Put in front of every script that writes to {trust}:*. A refusal is an error reply with a stable first word, made
-- before anything is written.

local function field(info, name)
  return string.match(info, name .. ':([^\r\n]*)')
end

-- The server's replication id, or nil and an error reply if it is not a master.
local function master_replid()
  local info = redis.call('INFO', 'replication')
  if field(info, 'role') ~= 'master' then
    return nil, redis.error_reply('TRUST_NOT_PRIMARY the server is not a master')
  end
  return field(info, 'master_replid')
end

-- nil if the caller may write in the epoch (number, nonce) that it believes in; otherwise an error reply.
local function check_epoch(epoch_key, number, nonce)
  local replid, refusal = master_replid()
  if not replid then
    return refusal
  end
  local held = redis.call('HMGET', epoch_key, 'number', 'nonce', 'replid')
  if not held[1] then
    return redis.error_reply('TRUST_NO_EPOCH there is no epoch')
  end
  if held[3] ~= replid then
    return redis.error_reply('TRUST_REPLID the server has another replication id than the epoch')
  end
  if held[1] ~= number or held[2] ~= nonce then
    return redis.error_reply('TRUST_EPOCH another epoch is current')
  end
  return nil
end

local function server_ms()
  local time = redis.call('TIME')
  return string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
end
